"""Tell which JPEGs a GPU decodes to the same picture as the CPU, from their bytes alone.

The answer depends on the image and on nothing else, so an image is always decoded in one place. The
one exception is an image that stands in for a damaged one: then the CPU decodes it, whatever it is.
"""

from typing import NamedTuple

from shards.dimensions import ALONE, FRAMES, image_size
from shards.signatures import JPEG

_HUFFMAN_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, without arithmetic code
_ADOBE = 0xEE
_END = b"\xff\xd9"


class Frame(NamedTuple):
    """What the segments before a JPEG's image data say about its colors."""

    marker: int
    bits: int
    components: bytes  # the number of each component
    adobe: int | None  # the color transform of Adobe's segment, 0 for none


def suits_gpu(content: memoryview, most_pixels: int) -> bool:
    """Return whether these bytes are a whole JPEG of up to `most_pixels` that a GPU decodes.

    It has 8 bits, is gray or YCbCr, and ends where a JPEG has to end: a GPU's decoder may take what
    is cut short for good.
    """
    if content[:3] != JPEG or content[-2:] != _END:
        return False
    width, height = image_size(content) or (0, 0)
    frame = _read_frame(content)
    if frame is None or not 0 < width * height <= most_pixels:
        return False
    if frame.marker not in _HUFFMAN_FRAMES or frame.bits != 8:
        return False
    if len(frame.components) == 1:
        return True
    stored_as_rgb = frame.components == b"RGB" or frame.adobe == 0
    return len(frame.components) == 3 and not stored_as_rgb


def _read_frame(content: memoryview) -> Frame | None:
    """Read the first frame header, and Adobe's segment where one stands before it."""
    position, end, adobe = 2, len(content), None
    while position + 4 <= end:
        if content[position] != 0xFF:
            return None  # Decoders skip such bytes, each in its own way.
        marker = content[position + 1]
        if marker == 0xFF or marker in ALONE:  # 0xFF fills the space between two segments.
            position += 1 if marker == 0xFF else 2
            continue
        size = int.from_bytes(content[position + 2 : position + 4], "big")
        body = bytes(content[position + 4 : position + 2 + size])
        if marker in FRAMES:
            whole = len(body) >= 6 and len(body) >= 6 + 3 * body[5]
            return Frame(marker, body[0], body[6 : 6 + 3 * body[5] : 3], adobe) if whole else None
        if marker == _ADOBE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        position += 2 + size
    return None
