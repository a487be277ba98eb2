"""Read the EXIF orientation of a JPEG, PNG or WebP image, and turn an image upright by it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from PIL.Image import Exif

from shards.signatures import JPEG, PNG, is_webp

if TYPE_CHECKING:  # torch takes seconds to import, and the help pages need none
    from torch import Tensor

_TAG = 0x0112  # EXIF's number for the orientation
_UPRIGHT = 1
_EXIF = b"Exif\0\0"

Bytes = bytes | bytearray | memoryview


def image_orientation(content: Bytes) -> int:
    """Return the EXIF orientation, from 1 to 8, of an encoded image; 1 when it has none."""
    return next((exif_orientation(bytes(exif)) for exif in _find_exif(content)), _UPRIGHT)


def exif_orientation(exif: bytes) -> int:
    """Return the orientation, from 1 to 8, in EXIF data. Damaged data have the orientation 1."""
    data = exif.removeprefix(_EXIF)
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], order)

    first = number(4, 4)  # The entries of 12 bytes stand there, behind their number.
    for start in range(first + 2, min(first + 2 + 12 * number(first, 2), len(data) - 11), 12):
        if number(start, 2) == _TAG and number(start + 8, 2) in range(1, 9):
            return number(start + 8, 2)
    return _UPRIGHT


def make_exif(orientation: int) -> bytes:
    """Make EXIF data that hold an orientation and nothing else."""
    made = Exif()
    made[_TAG] = orientation
    return made.tobytes()


def turn(image: "Tensor", orientation: int) -> "Tensor":
    """Turn an image [C, H, W] upright, given its EXIF orientation from 1 to 8."""
    if orientation >= 5:  # These have rows and columns exchanged.
        image = image.transpose(1, 2)
    flipped = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    return image.flip(flipped) if flipped else image


def _find_exif(content: Bytes) -> Iterator[Bytes]:
    """Yield the EXIF data of an encoded image. Decoders take the first ones."""
    start = bytes(content[:12])
    if start.startswith(JPEG):
        return _find_in_jpeg(content)
    if start.startswith(PNG):
        return _find_in_chunks(content, len(PNG), b"eXIf", png=True)
    if is_webp(start):
        return _find_in_chunks(content, 12, b"EXIF", png=False)
    return iter(())


def _find_in_jpeg(content: Bytes) -> Iterator[Bytes]:
    """Yield the EXIF data in the segments before the image data."""
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # It fills the space between two segments.
            position += 1
            continue
        if marker in (0xD9, 0xDA):
            return
        size = int.from_bytes(bytes(content[position + 2 : position + 4]), "big")
        if marker == 0xE1 and bytes(content[position + 4 : position + 10]) == _EXIF:
            yield content[position + 10 : position + 2 + size]
        position += 2 + size


def _find_in_chunks(content: Bytes, position: int, wanted: bytes, png: bool) -> Iterator[Bytes]:
    """Yield the chunks of one kind of a PNG or WebP file, from `position` on."""
    while position + 8 <= len(content):
        first, second = (bytes(content[position + i : position + i + 4]) for i in (0, 4))
        size = int.from_bytes(first, "big") if png else int.from_bytes(second, "little")
        if (second if png else first) == wanted:
            yield content[position + 8 : position + 8 + size]
        position += 8 + size + (4 if png else size % 2)  # A CRC, or padding, follows.
