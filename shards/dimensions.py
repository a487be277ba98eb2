"""Read the width and height of an encoded image from its header, without decoding it."""

import struct

from shards.signatures import JPEG, PNG, is_webp

# Above this bound Pillow suspects a decompression bomb. It is 268 MB of pixels in RGB.
MOST_PIXELS = 89_478_485

FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # These are JPEG's "start of frame" markers.
ALONE = {0x01, *range(0xD0, 0xD8)}  # No segment follows these JPEG markers.
_IMAGE_OR_END = {0xD9, 0xDA}
_SEGMENT = struct.Struct(">BBH")  # 0xFF, the marker, and the length of a JPEG's segment
_FRAME_SIZE = struct.Struct(">HH")  # height, width
_PNG_SIZE = struct.Struct(">II")  # width, height

Size = tuple[int, int]  # width, height in pixels


def image_size(content: bytes | bytearray | memoryview) -> Size | None:
    """Read the size from the header of a JPEG, PNG or WebP.

    Return None for other or damaged bytes.
    """
    start = bytes(content[:30]).ljust(30, b"\0")  # The smallest WebP images are shorter.
    if start.startswith(JPEG):
        return _jpeg_size(content)
    if start.startswith(PNG):
        width, height = _PNG_SIZE.unpack_from(start, 16)
        return (width, height) if start[12:16] == b"IHDR" else None
    if is_webp(start):
        return _webp_size(start)
    return None


def is_animated(content: bytes | bytearray | memoryview) -> bool:
    """Return whether the header of a WebP announces an animation."""
    start = bytes(content[:21])
    is_extended = is_webp(start) and start[12:16] == b"VP8X" and len(start) == 21
    return is_extended and bool(start[20] & 2)


def _jpeg_size(content: bytes | bytearray | memoryview) -> Size | None:
    """Read the size from the first frame header.

    Other segments are skipped, and with them the thumbnails that EXIF data may hold.
    """
    position, end = 2, len(content)
    while position + 9 <= end:
        first, marker, length = _SEGMENT.unpack_from(content, position)
        if first != 0xFF:  # Decoders skip bytes between two segments, as here.
            position += 1
            continue
        if marker in FRAMES:
            height, width = _FRAME_SIZE.unpack_from(content, position + 5)
            return width, height
        if marker in _IMAGE_OR_END:
            return None
        if marker == 0xFF or marker == 0 or marker in ALONE:
            position += 1 if marker == 0xFF else 2
        else:
            position += 2 + length
    return None


def _webp_size(start: bytes) -> Size | None:
    kind = start[12:16]
    if kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        return _little(start, 26, 2) & 0x3FFF, _little(start, 28, 2) & 0x3FFF
    if kind == b"VP8L" and start[20] == 0x2F:
        bits = _little(start, 21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return _little(start, 24, 3) + 1, _little(start, 27, 3) + 1
    return None


def _little(content: bytes, position: int, count: int) -> int:
    return int.from_bytes(content[position : position + count], "little")
