"""Decode image bytes and cut uint8 crops. One decode serves all crops of an image.

This code runs in threads: torchvision's decode and torch's resize release the GIL.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from shards.dimensions import MOST_PIXELS, image_size

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


class DecodeError(Exception):
    """The bytes are not an image that can be decoded. The text says why, in one line."""


def decode(content: bytearray, offset: int, size: int) -> Tensor:
    """Decode the image in content[offset : offset + size] to uint8 RGB [3, H, W].

    Raises DecodeError.
    """
    if size == 0:
        raise DecodeError("empty")
    _check_size(memoryview(content)[offset : offset + size])
    try:
        image: Tensor = decode_image(
            torch.frombuffer(content, dtype=torch.uint8, count=size, offset=offset),
            ImageReadMode.RGB,
        )
    except RuntimeError as error:
        raise DecodeError(str(error).splitlines()[0].rsplit(", ", 1)[-1]) from None
    if image.dtype == torch.uint16:  # The image is a PNG with 16 bits per channel.
        image = (image.int() >> 8).byte()
    return image


def _check_size(content: memoryview) -> None:
    """Raise DecodeError when the header is unknown or announces more than MOST_PIXELS pixels.

    Decoders trust the header and allocate what it says before they look at the rest.
    """
    found = image_size(content)
    if found is None:
        raise DecodeError("no JPEG, PNG or WebP image")
    width, height = found
    if width * height > MOST_PIXELS:
        raise DecodeError(f"{width} x {height} pixels, more than {MOST_PIXELS:,}")


def crop_resize(image: Tensor, box: Box, size: int) -> Tensor:
    """Cut one box out of `image` [3, H, W] and resize it to [3, size, size], both uint8.

    The interpolation is bicubic, without antialiasing. On uint8 torch runs a vectorized kernel,
    which is four times as fast as its float32 kernel.
    """
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    return F.interpolate(crop, (size, size), mode="bicubic", align_corners=False)[0]


def center_box(height: int, width: int, fraction: float) -> Box:
    """Return the central square whose side is `fraction` of the image's shorter side.

    The rounding is that of the official implementation.
    """
    side = max(1, int(fraction * min(height, width)))
    return (height - side + 1) // 2, (width - side + 1) // 2, side, side
