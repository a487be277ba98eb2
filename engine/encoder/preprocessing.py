"""Turn an image into the encoder's input, exactly as evaluations do, by what a card says."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from PIL.Image import Image as PillowImage
from torch import Tensor

from engine.method.augment import MEAN, STD, normalize
from shards.decode import (
    DEFAULT_RULES,
    DecodeError,
    Exif,
    PixelRules,
    center_box,
    crop_resize,
    decode,
)
from shards.documents import Natural, build
from shards.errors import InputError
from shards.fields import UnitInterval
from shards.making.convert import PixelOptions, convert
from shards.making.pictures import UnusableError
from shards.storage import files

Picture = str | os.PathLike[str] | PillowImage | Tensor


@dataclass(frozen=True)
class _Input:
    """The part of a card that describes the input."""

    size: Natural
    resize_shorter_side: Natural
    exif_orientation: Exif = "ignore"
    crop_fraction: UnitInterval | None = None  # Cards of the first release have none.
    max_pixels: Natural = DEFAULT_RULES.max_pixels
    mean: list[float] = field(default_factory=lambda: list(MEAN))
    std: list[float] = field(default_factory=lambda: list(STD))


@dataclass(frozen=True)
class _Card:
    input: _Input


@dataclass(frozen=True)
class Transform:
    """Turn an image into an encoder's input: RGB, central crop, bicubic, normalized.

    The resizing has no antialiasing, and its result is rounded to 8 bits, as in training.
    """

    size: int
    """Side of the input, in pixels."""
    crop: float
    """Side of the central square, as a fraction of the image's shorter side."""
    rules: PixelRules = DEFAULT_RULES
    """The rules by which image files become pixels."""

    def __call__(self, image: Picture) -> Tensor:
        """Return the input [3, S, S] in float32.

        Args:
            image: A path or URL, a picture of PIL, or a uint8 tensor [3, H, W] or [1, H, W].

        Raises InputError when the image cannot be decoded or is of another kind.
        """
        pixels = self.crop_pixels(self._read(image))
        normal: Tensor = normalize(pixels[None].float() / 255)[0].contiguous()
        return normal

    def crop_pixels(self, pixels: Tensor) -> Tensor:
        """Cut the central square out of a uint8 image [3, H, W]: [3, S, S] uint8."""
        box = center_box(pixels.shape[1], pixels.shape[2], self.crop)
        return crop_resize(pixels, box, self.size)

    def _read(self, image: Picture) -> Tensor:
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 or image.ndim != 3 or len(image) not in (1, 3):
                kind = f"{image.dtype} {list(image.shape)}"
                raise InputError(f"a tensor must be uint8 [3, H, W] or [1, H, W], not {kind}")
            return image.expand(3, -1, -1)
        if isinstance(image, PillowImage):
            if image.mode[:1] in ("I", "F"):
                raise InputError(f"a picture of mode {image.mode} has no 8 bits: convert it first")
            upright = ImageOps.exif_transpose(image) if self.rules.exif == "apply" else image
            return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)
        url = os.fspath(image)
        try:
            return decode_file(
                url, files.read(url), PixelOptions(self.rules.max_pixels), self.rules
            )
        except DecodeError as error:
            raise InputError(f"{files.redact(url)}: {error}") from None


def decode_file(path: str, content: bytes, options: PixelOptions, rules: PixelRules) -> Tensor:
    """Decode an image file of any format that packing takes to the pixels that it would pack.

    Returns:
        The pixels, uint8 RGB [3, H, W].

    Raises DecodeError when it holds no image, and InputError when it needs a window of values.
    """
    try:
        packed = convert(path, content, options).content
    except UnusableError as error:
        raise DecodeError(str(error)) from None
    return decode(bytearray(packed), 0, len(packed), rules)


def transform(card: dict[str, Any] | str | Path) -> Transform:
    """Return what turns an image into the input of an exported encoder.

    Args:
        card: The content of `card.json`, or its path or URL.

    Raises InputError when the card says nothing of the input, or not what this version computes.
    """
    document = card
    if not isinstance(card, dict):
        try:
            document = files.read_json(str(card))
        except FileNotFoundError:
            raise InputError(f"{files.redact(str(card))}: no such file, give card.json") from None
        except ValueError as error:
            raise InputError(f"{files.redact(str(card))}: is no card: {error}") from None
    found = build(_Card, document).input
    if tuple(found.mean) != MEAN or tuple(found.std) != STD:
        raise InputError("input.mean and input.std of the card are not those of this version")
    if not 1 <= found.size <= 2**12:
        raise InputError(f"input.size of the card must be from 1 to 4,096, not {found.size}")
    rules = PixelRules(found.max_pixels, found.exif_orientation)
    return Transform(found.size, _fraction(found, document), rules)


def _fraction(found: _Input, document: Any) -> float:
    """Return the crop's fraction, which cards of the first release give rounded only."""
    if found.crop_fraction:
        return found.crop_fraction
    side = max(1, found.resize_shorter_side)
    recipe = document.get("recipe")
    known = [0.875, *([recipe.get("probe.crop")] if isinstance(recipe, dict) else [])]
    for fraction in reversed(known):
        if isinstance(fraction, float) and fraction > 0 and round(found.size / fraction) == side:
            return fraction
    return min(1.0, found.size / side)
