"""Read the EXIF orientation of a WebP image, and turn an image upright by it."""

from collections.abc import Iterator
from typing import Literal

from PIL.Image import Exif
from torch import Tensor

_TAG = 0x0112  # EXIF's number for the orientation
_UPRIGHT = 1

Bytes = bytes | bytearray | memoryview


def webp_orientation(content: Bytes) -> int:
    """Return the EXIF orientation, from 1 to 8, of a WebP image, and 1 for all other content."""
    for kind, chunk in _webp_chunks(content):
        if kind == b"EXIF":
            return exif_orientation(bytes(chunk))
    return _UPRIGHT


def exif_orientation(exif: bytes) -> int:
    """Return the orientation, from 1 to 8, in EXIF data. Damaged data have the orientation 1."""
    data = exif.removeprefix(b"Exif\0\0")
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


def turn(image: Tensor, orientation: int) -> Tensor:
    """Turn an image [C, H, W] upright, given its EXIF orientation from 1 to 8."""
    if orientation >= 5:  # These have rows and columns exchanged.
        image = image.transpose(1, 2)
    flipped = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    return image.flip(flipped) if flipped else image


def _webp_chunks(content: Bytes) -> Iterator[tuple[bytes, Bytes]]:
    """Yield the kind and the content of each chunk; nothing when the content is no WebP."""
    if bytes(content[:4]) != b"RIFF" or bytes(content[8:12]) != b"WEBP":
        return
    position = 12
    while position + 8 <= len(content):
        size = int.from_bytes(bytes(content[position + 4 : position + 8]), "little")
        yield bytes(content[position : position + 4]), content[position + 8 : position + 8 + size]
        position += 8 + size + size % 2
