"""Convert image files to what training decodes: JPEG, PNG or WebP of 8 bits, of a bounded size.

Most files are taken as they are, byte for byte. The others are decoded and encoded once:

- Formats that training does not decode, and animations, become PNG, by their first frame.
- More than 8 bits per channel become 8 by a window, as PNG.
- What is larger than asked for is shrunk. JPEG stays JPEG, and all else becomes PNG.

What is converted keeps its pixels as they were stored, and the EXIF orientation beside them.
"""

import io
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from shards.dimensions import MOST_PIXELS, image_size, is_animated
from shards.errors import InputError
from shards.making.bit_depth import find_bit_depth
from shards.making.pictures import (
    Picture,
    UnusableError,
    check_size,
    picture_size,
    read_picture,
    read_wide,
)
from shards.making.turns import take_turn
from shards.making.undecodable import name_format
from shards.making.window import Window, apply_window, explain_window, find_range
from shards.orientation import image_orientation, make_exif
from shards.png import undo_scaling
from shards.samples import PACKED_FIELDS

JPEG_QUALITY = 95


@dataclass(frozen=True)
class PixelOptions:
    """Options of a packing that decide about pixels."""

    max_pixels: int = MOST_PIXELS
    """Images of more pixels are not decoded."""
    max_side: int | None = None
    """Images whose longer side has more pixels are shrunk to it."""
    window: Window | None = None
    """The values that become 0 and 255, for images of more than 8 bits."""

    def facts(self) -> dict[str, Any]:
        """Return the options that are not the defaults, as JSON knows them."""
        given = {
            "max_pixels": self.max_pixels if self.max_pixels != MOST_PIXELS else None,
            "max_side": self.max_side,
            "window": None if self.window is None else list(self.window),
        }
        return {name: value for name, value in given.items() if value is not None}


class Converted(NamedTuple):
    """What is packed in place of a file."""

    extension: str
    content: bytes
    done: str = ""  # what was done to it, one of a few texts; "" when it is the file itself


def convert(path: str, content: bytes, options: PixelOptions) -> Converted:
    """Convert an image file, or take it as it is.

    The result is a pure function of the arguments. Raises UnusableError when the file holds no
    image that can be used, and InputError when it needs a window and there is none.

    Args:
        path: The file's path, for its extension and for messages.
    """
    suffix = path.rpartition(".")[2].lower()
    try:
        size = image_size(content)
        if size is not None:
            check_size(*size, options.max_pixels)
        wide = find_bit_depth(lambda start, stop: content[start:stop]) > 8
        shrunk = size is not None and max(size) > (options.max_side or max(size))
        if size is not None and not (wide or shrunk or is_animated(content)):
            return Converted(packed_extension(path, content), content)
        pixels = math.prod(picture_size(content, suffix, options.max_pixels))
        return take_turn(pixels, lambda: _encode_anew(path, content, options, wide))
    except (InputError, UnusableError):
        raise
    except MemoryError:
        raise UnusableError("too large for the memory") from None
    except Exception:  # Pillow raises many kinds for damaged images.
        raise UnusableError(f"a damaged {name_format(content)}") from None


def _encode_anew(path: str, content: bytes, options: PixelOptions, wide: bool) -> Converted:
    """Decode an image, narrow and shrink it as the options say, and encode it."""
    suffix, name = path.rpartition(".")[2].lower(), name_format(content)
    if wide:
        picture = read_wide(content, suffix, options.max_pixels)
        picture = picture._replace(values=_narrow(picture.values, path, options.window))
    elif image_size(content) and not is_animated(content):
        picture = _decode(content, options.max_pixels)
    else:
        picture = read_picture(content, suffix, options.max_pixels)
    values, shrunk = _shrink(picture.values, options.max_side)
    form = "JPEG" if name == "JPEG" else "PNG"
    encoded = _encode(values, picture.orientation, form)
    done = _describe(name, form, wide, options.max_side if shrunk else None)
    return Converted("jpg" if form == "JPEG" else "png", encoded, done)


def packed_extension(path: str, content: bytes) -> str:
    """Return the extension under which a file is packed as it is."""
    suffix = path.rpartition(".")[2].lower()
    if suffix in PACKED_FIELDS:
        return suffix
    return {"JPEG": "jpg", "WebP": "webp"}.get(name_format(content), "png")


def _narrow(values: NDArray[Any], path: str, window: Window | None) -> NDArray[np.uint8]:
    """Convert values of more than 8 bits to 8. Raises InputError when a window is missing."""
    if window is not None:
        return apply_window(values, window)
    narrow = undo_scaling(values)
    if narrow is None:
        low, high = find_range(values)
        raise InputError(f"SOURCE {path}: it has {explain_window(low, high)}")
    return narrow


def _decode(content: bytes, most: int) -> Picture:
    """Decode as training does, except that gray images stay gray."""
    from shards.decode import DecodeError, PixelRules, decode  # imports torch, which takes seconds

    try:
        image = decode(bytearray(content), 0, len(content), PixelRules(most)).numpy()
    except DecodeError:
        raise UnusableError(f"a damaged {name_format(content)}") from None
    return Picture(image.transpose(1, 2, 0), image_orientation(content))


def _shrink(values: NDArray[np.uint8], side: int | None) -> tuple[NDArray[np.uint8], bool]:
    """Shrink an image so that its longer side is `side`, antialiased by Lanczos's kernel."""
    height, width = values.shape[:2]
    longer = max(height, width)
    if side is None or longer <= side:
        return values, False
    size = (max(1, round(width * side / longer)), max(1, round(height * side / longer)))
    picture = PillowImage.fromarray(np.ascontiguousarray(values))
    return np.asarray(picture.resize(size, PillowImage.Resampling.LANCZOS)), True


def _encode(values: NDArray[np.uint8], orientation: int, form: str) -> bytes:
    """Encode gray or RGB values with an orientation. Colors that are all gray become gray."""
    if values.ndim == 3 and all(np.array_equal(values[..., 0], values[..., i]) for i in (1, 2)):
        values = values[..., 0]
    options: dict[str, Any] = {"exif": make_exif(orientation)} if orientation != 1 else {}
    if form == "JPEG":
        options |= {"quality": JPEG_QUALITY, "subsampling": 0}
    buffer = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(values)).save(buffer, form, **options)
    return buffer.getvalue()


def _describe(name: str, form: str, wide: bool, side: int | None) -> str:
    """Say in a few words what was done to an image."""
    what = f"{name} of more than 8 bits" if wide else name
    if name == "WebP" and not side:  # Others of these are packed as they are.
        what = "animated WebP"
    to = f" to {form}" if name != form or wide else ""
    return f"{what}{to}" + (f", shrunk to {side} pixels" if side else "")
