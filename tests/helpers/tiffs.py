"""Write TIFFs that Pillow cannot write: colors of 16 bits per channel."""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def encode_color_tiff(values: NDArray[np.uint16], order: str = "<", deflate: bool = False) -> bytes:
    """Encode values [H, W, C] of 16 bits; `order` is < for little-endian numbers and > for big."""
    height, width, channels = values.shape
    content = values.astype(f"{order}u2").tobytes()
    content = zlib.compress(content) if deflate else content
    depths = 8  # The header is before them.
    strip = depths + 2 * channels
    entries = [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, depths)),
        *((259, 3, 1, 8 if deflate else 1), (262, 3, 1, 2), (273, 4, 1, strip)),
        *((277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(content)), (284, 3, 1, 1)),
    ]
    if channels == 4:
        entries.append((338, 3, 1, 2))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", strip + len(content))
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        directory += struct.pack(f"{order}HHI", tag, kind, count)
        short = kind == 3 and count == 1
        directory += struct.pack(f"{order}HH" if short else f"{order}I", *([value, 0][: 1 + short]))
    return (
        head + struct.pack(f"{order}{channels}H", *[16] * channels) + content + directory + bytes(4)
    )
