"""Encode and decode PNG files.

Pillow decodes them, because torchvision's decoder (of 0.29 at least) ends the process when a PNG is
damaged. It takes about as long.
"""

import io
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from shards.signatures import PNG

_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_GRAY, _GRAY_WITH_ALPHA = 0, 4  # color types of PNG

_OTHER_HALF = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}

Bytes = bytes | bytearray | memoryview


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode color pixels [H, W, 3] or gray pixels [H, W] as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(content: Bytes) -> NDArray[Any]:
    """Decode a PNG to gray [H, W] or RGB [H, W, 3], as uint8, or as uint16 if it has 16 bits.

    Transparency is dropped. The caller checks the size. Pillow raises exceptions of many kinds when
    the file is damaged.
    """
    # This class does not print warnings about the size, as Image.open does.
    try:
        picture = PngImageFile(io.BytesIO(content))
    except ValueError:  # Pillow refuses texts and color profiles of more than 1 MB.
        content = _keep_pixels(content)
        picture = PngImageFile(io.BytesIO(content))
    if content[24] == 16:
        return _decode_wide(picture, content)
    picture.info.pop("transparency", None)  # Pillow would warn of it.
    if picture.mode == "1":
        return np.array(picture.convert("L"))
    if picture.mode == "P":
        return np.array(picture.convert("RGB"))
    values = np.array(picture)
    return (
        values[..., 0] if picture.mode == "LA" else values[..., :3] if values.ndim == 3 else values
    )


def _keep_pixels(content: Bytes) -> bytes:
    """Return a PNG without the chunks that do not change its pixels."""
    position, kept = len(PNG), [PNG]
    while position + 8 <= len(content):
        stop = position + 12 + int.from_bytes(bytes(content[position : position + 4]), "big")
        if bytes(content[position + 4 : position + 8]) in _PIXEL_CHUNKS:
            kept.append(bytes(content[position:stop]))
        position = stop
    return b"".join(kept)


def _decode_wide(picture: PngImageFile, content: Bytes) -> NDArray[np.uint16]:
    """Decode a PNG of 16 bits per channel."""
    if content[25] == _GRAY:
        return np.array(picture).astype(np.uint16, copy=False)
    if content[25] == _GRAY_WITH_ALPHA:
        # The four bytes of a pixel are read as if they were four channels.
        picture._mode = "RGBA"
        picture.tile = [replace_mode(tile, "RGBA") for tile in picture.tile]
        return join_halves(*np.moveaxis(np.asarray(picture)[..., :2], -1, 0))
    again = PngImageFile(io.BytesIO(content))
    again.tile = [replace_mode(tile, other_half(str(tile[3]))) for tile in again.tile]
    return join_halves(np.asarray(picture)[..., :3], np.asarray(again)[..., :3])


def join_halves(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Join the high and the low bytes of values."""
    values = high.astype(np.uint16)
    values <<= 8
    values |= low
    return values


def other_half(mode: str) -> str:
    """Return the raw mode by which Pillow keeps the other byte of each 16-bit value.

    Pillow reads colors of 16 bits as 8 bits, and keeps the high byte of each value. It keeps the
    low byte when it is told that the bytes stand in the other order.
    """
    return mode[:-1] + _OTHER_HALF[mode[-1]]


def replace_mode(tile: Any, mode: str) -> Any:
    """Return Pillow's description of a part of a file, with another raw mode."""
    arguments = mode if isinstance(tile[3], str) else (mode, *tile[3][1:])
    if hasattr(tile, "_replace"):
        return tile._replace(args=arguments)
    return (*tile[:3], arguments)  # In older releases of Pillow, it is a plain tuple.


def undo_scaling(values: NDArray[Any]) -> NDArray[np.uint8] | None:
    """Return v where all values are v * 257: an 8-bit image that was scaled up. Else None.

    The two bytes of such values are equal, so that no window is needed. Nothing is copied to a
    wider type, as such images are large.
    """
    if values.dtype != np.uint16:
        return None
    halves = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, 2)
    for row in halves:  # Most images that were not scaled up differ in their first rows.
        if not np.array_equal(row[..., 0], row[..., 1]):
            return None
    return np.ascontiguousarray(halves[..., 0])
