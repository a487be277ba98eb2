"""The bytes that files of the known image formats begin with."""

JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG_2000 = b"\xff\x4f\xff\x51"  # without a container


def is_webp(start: bytes) -> bool:
    """Return whether a file that starts so is a WebP. `start` has at least 12 bytes of it."""
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP"
