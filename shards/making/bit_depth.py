"""Find the bits per channel of an image file, from its header alone."""

import re
from collections.abc import Callable
from typing import Literal

from shards.signatures import JPEG_2000, PNG, TIFF

# Reads the bytes [start, stop) of a file, or fewer where the file ends before.
Read = Callable[[int, int], bytes]

# Files with these extensions may hold more than 8 bits per channel.
MAY_BE_WIDE = ("png", "tif", "tiff", "ppm", "pgm", "pnm", "pfm", "jp2", "j2k")

_HEAD = 512  # The headers of all formats but TIFF lie in so many bytes.
_SPACE = rb"(?:\s|#[^\n]*\n)+"
PNM_HEADER = re.compile(rb"P([2356])" + 3 * (_SPACE + rb"(\d+)") + rb"\s")
_BITS_PER_SAMPLE = 258  # TIFF's number for it


def find_bit_depth(read: Read) -> int:
    """Return the bits per channel that the header announces; 8 when it announces none."""
    start = read(0, _HEAD)
    if start.startswith(PNG):
        return start[24] if len(start) > 24 else 8
    if start.startswith(TIFF):
        return _tiff_depth(start, read)
    if found := PNM_HEADER.match(start):
        return int(found[4][:9]).bit_length()
    if start[:3] in (b"PF\n", b"Pf\n"):
        return 32
    if start.startswith(JPEG_2000):
        return (start[42] & 0x7F) + 1 if len(start) > 42 else 8
    if start[4:8] == b"jP  " and 0 < (place := start.find(b"ihdr")) < len(start) - 14:
        return (start[place + 14] & 0x7F) + 1
    return 8


def _tiff_depth(start: bytes, read: Read) -> int:
    """Return the largest entry of BitsPerSample in the first directory."""
    order: Literal["little", "big"] = "little" if start[:1] == b"I" else "big"
    large = b"+" in start[2:4]  # BigTIFF has wider numbers.
    width, entry = (8, 20) if large else (4, 12)

    def number(content: bytes) -> int:
        return int.from_bytes(content, order)

    directory = number(start[width : 2 * width])
    first = directory + (8 if large else 2)
    count = min(number(read(directory, first)), 4096)
    entries = read(first, first + entry * count)
    for place in range(0, len(entries), entry):
        if number(entries[place : place + 2]) == _BITS_PER_SAMPLE:
            channels = min(number(entries[place + 4 : place + 4 + width]), 64)
            value = entries[place + 4 + width : place + entry]
            if 2 * channels > width:  # The values stand elsewhere.
                value = read(number(value), number(value) + 2 * channels)
            return max([number(value[i : i + 2]) for i in range(0, 2 * channels, 2)], default=8)
    return 1  # This is the default of the format.
