"""Read pictures in formats that training does not decode, and those of more than 8 bits.

Training decodes JPEG, PNG and WebP. Packing reads the others by Pillow, once. The rules are those
of training's decoder: colors as they are stored, without color profiles, and without transparency.
"""

import io
import threading
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from shards.dimensions import image_size
from shards.making.bit_depth import PNM_HEADER
from shards.making.undecodable import find_fault, name_format
from shards.orientation import image_orientation
from shards.png import decode_png, join_halves, other_half, replace_mode

# Pillow knows more formats. Some of them start other programs, such as EPS, and some are rare.
_FORMATS = ("BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI", "WEBP")
_BY_SUFFIX = {"tga": ("TGA",)}  # A TGA has no mark at its start by which it could be known.
_WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "F")
_ORIENTATION = 0x0112
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a field of TIFF

_opening = threading.Lock()


class UnusableError(Exception):
    """An image cannot be packed as pixels. The text is one of a few that say why."""


class Picture(NamedTuple):
    """A picture's pixels as they are stored, and how it has to be turned."""

    values: NDArray[Any]  # [H, W] or [H, W, 3]; uint8, or a wider type
    orientation: int  # by EXIF, from 1 to 8


def check_size(width: int, height: int, most: int) -> None:
    """Raise UnusableError when an image has more than `most` pixels."""
    if width * height > most:
        raise UnusableError(
            f"more than {most:,} pixels: raise --max-pixels, and data.max_pixels in training "
            "unless --max-side shrinks them"
        )


def picture_size(content: bytes, suffix: str, most: int) -> tuple[int, int]:
    """Return the width and height in a picture's header. Raises UnusableError as reading does."""
    if size := image_size(content):
        return size
    with _open(content, suffix, most) as picture:
        return picture.size


def read_picture(content: bytes, suffix: str, most: int) -> Picture:
    """Read the first frame of a picture of up to 8 bits per channel, by Pillow.

    Raises UnusableError when that is not possible.

    Args:
        suffix: The file name's extension in small letters.
        most: The most pixels that the picture may have.
    """
    with _open(content, suffix, most) as picture:
        picture.load()
        # Pillow has turned TIFFs by now, because the format itself asks for it.
        orientation = picture.getexif().get(_ORIENTATION, 1)
        colors = _to_colors(picture, content)
        values = np.asarray(colors)
    return Picture(values, orientation if orientation in range(1, 9) else 1)


def read_wide(content: bytes, suffix: str, most: int) -> Picture:
    """Read a picture of more than 8 bits per channel. Its values are not changed.

    Raises UnusableError when that is not possible.
    """
    if size := image_size(content):
        check_size(*size, most)
        return Picture(decode_png(content), image_orientation(content))
    if content[:2] in (b"P5", b"P6"):
        return Picture(_read_pnm(content, most), 1)
    with _open(content, suffix, most) as picture:
        if picture.mode not in _WIDE_MODES:
            return Picture(_read_colors(picture, content), 1)
        picture.load()
        values = np.asarray(picture)
        if getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            if values.dtype != np.uint16:
                raise UnusableError("a TIFF of more than 16 bits in which 0 is white")
            values = 65535 - values
    return Picture(values, 1)


def _open(content: bytes, suffix: str, most: int) -> ImageFile:
    """Read a picture's header by Pillow."""
    with _opening:  # Pillow's limit is global, so this is one thread at a time.
        limit, PillowImage.MAX_IMAGE_PIXELS = PillowImage.MAX_IMAGE_PIXELS, most
        try:
            formats = _BY_SUFFIX.get(suffix, _FORMATS)
            picture = PillowImage.open(io.BytesIO(content), formats=formats)
        except UnidentifiedImageError:
            raise UnusableError(find_fault(content)) from None
        except PillowImage.DecompressionBombError:
            check_size(most + 1, 1, most)
            raise AssertionError("unreachable") from None
        finally:
            PillowImage.MAX_IMAGE_PIXELS = limit
    check_size(*picture.size, most)
    return picture


def _to_colors(picture: PillowImage.Image, content: bytes) -> PillowImage.Image:
    """Convert to gray or RGB. Transparency is dropped: what lies under it is shown as stored."""
    picture.info.pop("transparency", None)  # Pillow would warn of it.
    if picture.mode in ("1", "L", "LA", "La"):
        return picture.convert("LA").convert("L") if picture.mode == "La" else picture.convert("L")
    if picture.mode == "RGBa":
        return picture.convert("RGBA").convert("RGB")
    if picture.mode in ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
        return picture.convert("RGB")
    raise UnusableError(f"a {name_format(content)} in the mode {picture.mode}, not gray or RGB")


def _read_pnm(content: bytes, most: int) -> NDArray[np.uint16]:
    """Decode a binary PGM or PPM of 16 bits. Pillow would cut colors to 8 bits."""
    header = PNM_HEADER.match(content)
    assert header is not None  # The bit depth was read from it.
    width, height = int(header[2]), int(header[3])
    check_size(width, height, most)
    channels = 3 if header[1] == b"6" else 1
    values = np.frombuffer(content, ">u2", width * height * channels, header.end())
    shape = (height, width, 3) if channels == 3 else (height, width)
    return values.astype(np.uint16).reshape(shape)


def _read_colors(picture: ImageFile, content: bytes) -> NDArray[np.uint16]:
    """Decode a color TIFF of 16 bits: [H, W, 3].

    Pillow keeps one of the two bytes of each value, so it decodes the picture twice.
    """
    tiles: list[Any] = picture.tile if picture.format == "TIFF" else []
    modes = [tile[3][0] for tile in tiles]  # such as RGB;16L, where L is for little-endian
    if not modes or any(mode[:-1] not in ("RGB;16", "RGBA;16", "RGBX;16") for mode in modes):
        raise UnusableError(
            f"a {name_format(content)} of more than 8 bits, of which Pillow reads 8: "
            "convert it to a PNG of 16 bits"
        )
    with TiffImageFile(io.BytesIO(content)) as again:
        again.tile = [replace_mode(tile, other_half(tile[3][0])) for tile in tiles]
        return join_halves(*(np.asarray(one.convert("RGB")) for one in (picture, again)))
