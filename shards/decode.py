"""Decode image bytes and cut uint8 crops. One decode serves all crops of an image.

This code runs in threads: the decoders and torch's resize release the GIL.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode

from shards.dimensions import MOST_PIXELS, image_size, is_animated
from shards.orientation import image_orientation, turn
from shards.png import decode_png, undo_scaling
from shards.signatures import JPEG, PNG

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
Rest = TypeVar("Rest")  # what a caller has to know of an image, beside its pixels
Exif = Literal["ignore", "apply"]

BYTES_AT_ONCE = 100_000  # Images of up to about so many bytes are decoded before they are cut.

# torchvision's function of this name takes half as long again, to warn and to log each time.
_decode_image: Callable[..., Tensor] = torch.ops.image.decode_image
_RGB = ImageReadMode.RGB.value
# F.interpolate takes no `out`, so this is the function that it calls.
_bicubic: Callable[..., Tensor] = torch._C._nn.upsample_bicubic2d


class DecodeError(Exception):
    """The bytes are not an image that can be decoded. The text says why, in one line."""


@dataclass(frozen=True)
class PixelRules:
    """The rules by which image files become pixels. Training, evaluation and export share them."""

    max_pixels: int = MOST_PIXELS
    """Images whose header claims more pixels are not decoded."""
    exif: Exif = "ignore"
    """What happens to the orientation in an image's EXIF data. "ignore" takes the pixels as they
    are stored, as the official code does, and "apply" turns them upright."""


DEFAULT_RULES = PixelRules()


def decode(content: bytearray, offset: int, size: int, rules: PixelRules = DEFAULT_RULES) -> Tensor:
    """Decode the image in content[offset : offset + size] to uint8 RGB [3, H, W].

    Raises DecodeError.
    """
    if size == 0:
        raise DecodeError("empty")
    encoded = memoryview(content)[offset : offset + size]
    _check_size(encoded, rules.max_pixels)
    if encoded[:3] != JPEG and is_animated(encoded):
        raise DecodeError("animated WebP: launch/pack.py SOURCE OUT takes its first frame")
    if encoded[:8] == PNG:
        image = _decode_png(encoded)
    else:
        buffer = torch.frombuffer(content, dtype=torch.uint8, count=size, offset=offset)
        try:
            image = _decode_image(buffer, _RGB)
        except RuntimeError as error:
            raise DecodeError(str(error).splitlines()[0].rsplit(", ", 1)[-1]) from None
    if rules.exif == "apply":  # torchvision could turn JPEG and PNG images, but not WebP.
        image = turn(image, image_orientation(encoded))
    return image


def _decode_png(encoded: memoryview) -> Tensor:
    """Decode a PNG to uint8 [3, H, W].

    Values of 16 bits are taken if they are 8 bits that were scaled up. Others are a DecodeError,
    because it is not known here which of them become black and white.
    """
    try:
        values = decode_png(encoded)
    except MemoryError:
        raise DecodeError("too large for the memory") from None
    except Exception as error:  # Pillow raises many kinds for damaged images.
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise DecodeError(f"damaged PNG: {reason}") from None
    narrow = undo_scaling(values) if values.dtype == np.uint16 else values
    if narrow is None:
        raise DecodeError(
            "16 bits per channel need a window: pack the images with "
            "launch/pack.py SOURCE OUT --window LOW HIGH"
        )
    if narrow.ndim == 2:
        narrow = np.repeat(narrow[..., None], 3, axis=2)
    image: Tensor = torch.from_numpy(narrow).permute(2, 0, 1)
    return image


def _check_size(content: memoryview, most: int) -> None:
    """Raise DecodeError when the header is unknown or announces more than `most` pixels.

    Decoders trust the header and allocate what it says before they look at the rest.
    """
    found = image_size(content)
    if found is None:
        raise DecodeError("no JPEG, PNG or WebP image")
    width, height = found
    if width * height > most:
        raise DecodeError(
            f"{width} x {height} pixels, more than data.max_pixels ({most:,}): raise it, or pack "
            "the images smaller with launch/pack.py --max-side"
        )


def crop_resize(image: Tensor, box: Box, size: int) -> Tensor:
    """Cut one box out of `image` [3, H, W] and resize it to [3, size, size], both uint8.

    The interpolation is bicubic, without antialiasing. On uint8 torch runs a vectorized kernel,
    which is four times as fast as its float32 kernel.
    """
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    return F.interpolate(crop, (size, size), mode="bicubic", align_corners=False)[0]


def crop_into(out: Tensor, image: Tensor, box: Box) -> None:
    """Write what `crop_resize` returns into `out` [1, 3, size, size], which is channels last.

    The kernel asks that both sides have this layout. It would make the same copy of the crop.
    """
    top, left, height, width = box
    channel, row, column = image.stride()
    start = image.storage_offset() + top * row + left * column
    # This is the slice of `crop_resize` in one call of torch in place of four.
    crop = image.as_strided((1, 3, height, width), (image.numel(), channel, row, column), start)
    crop = crop.contiguous(memory_format=torch.channels_last)
    size = out.size(3)
    _bicubic(crop, (size, size), False, out=out)


def decode_together(
    images: Iterable[tuple[Tensor, Rest]],
) -> Iterator[list[tuple[Tensor, Rest]]]:
    """Yield decoded images [3, H, W] in groups: small ones together, and large ones one by one.

    In a loop of its own, a decoder finds its code and its tables still in the processor's cache.
    """
    group: list[tuple[Tensor, Rest]] = []
    size = 0
    for image in images:
        group.append(image)
        size += image[0].numel()
        if size > BYTES_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def center_box(height: int, width: int, fraction: float) -> Box:
    """Return the central square whose side is `fraction` of the image's shorter side.

    The rounding is that of the official implementation.
    """
    side = max(1, int(fraction * min(height, width)))
    return (height - side + 1) // 2, (width - side + 1) // 2, side, side
