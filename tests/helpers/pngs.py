"""Write PNGs of kinds that Pillow does not write, such as colors of 16 bits per channel."""

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def encode_by_hand(values: NDArray[Any], bits: int) -> bytes:
    """Encode gray, gray and alpha, RGB or RGBA values [H, W, C]."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    digits = values.reshape(height, -1, 1).astype(np.uint16) >> np.arange(bits - 1, -1, -1) & 1
    packed = np.packbits(digits.reshape(height, -1).astype(np.uint8), axis=1)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
