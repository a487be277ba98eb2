"""Width and height from headers: Pillow's own, for every kind of file that it writes."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from shards.dimensions import image_size
from tests.conftest import draw_photo

SIZES = [(1, 1), (3, 2), (255, 257), (640, 33), (33, 640)]


def encode(width: int, height: int, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    PillowImage.open(io.BytesIO(draw_photo(0, width, height, "PNG"))).save(buffer, form, **options)
    return buffer.getvalue()


def thumbnail_exif() -> bytes:
    """EXIF data with an orientation, and a whole JPEG of 16 x 16 in it."""
    small = encode(16, 16, "JPEG")
    entries = struct.pack("<HHHII", 1, 0x0112, 3, 1, 1) + struct.pack("<I", 26)
    first = struct.pack("<HHIII", 0x0201, 4, 1, 0, 0)
    return b"Exif\0\0II*\0\x08\0\0\0" + entries + first + small


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"exif": thumbnail_exif(), "icc_profile": bytes(200_000)}),
        ("JPEG", {"comment": b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01\x03"}),
        ("PNG", {}),
        ("PNG", {"dpi": (72, 72)}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"icc_profile": b"profile"}),
        ("WEBP", {"lossless": True, "exif": thumbnail_exif()}),
    ],
)
def test_agrees_with_pillow(size: tuple[int, int], form: str, options: dict[str, Any]) -> None:
    content = encode(*size, form, **options)
    assert PillowImage.open(io.BytesIO(content)).size == size
    assert image_size(content) == size
    assert image_size(bytearray(content)) == size
    assert image_size(memoryview(b"--" + content + b"--")[2:-2]) == size


def test_a_thumbnail_is_not_taken() -> None:
    content = encode(300, 200, "JPEG", exif=thumbnail_exif())
    assert content.count(b"\xff\xc0\x00\x11\x08") == 2
    assert content.index(b"\xff\xc0\x00\x11\x08\x00\x10\x00\x10") < content.index(
        b"\xff\xc0\x00\x11\x08\x00\xc8\x01\x2c"
    )
    assert image_size(content) == (300, 200)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_other_modes(mode: str) -> None:
    picture = PillowImage.fromarray(np.zeros((20, 30), np.uint16 if mode == "I;16" else np.uint8))
    buffer = io.BytesIO()
    form = "JPEG" if mode == "CMYK" else "PNG"
    (picture if mode == "I;16" else picture.convert(mode)).save(buffer, form)
    assert image_size(buffer.getvalue()) == (30, 20)


def test_fill_bytes_and_strays_between_jpeg_segments() -> None:
    """As libjpeg has it: 0xFF may be repeated, and what is no marker is skipped."""
    content = encode(40, 30, "JPEG")
    loose = content[:2] + b"\xff\xff\xff" + content[2:20] + b"\x00\x17\xff\x00" + content[20:]
    assert image_size(loose) == PillowImage.open(io.BytesIO(content)).size


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_what_is_cut_or_random_raises_nothing(form: str) -> None:
    content = encode(40, 30, form)
    for length in range(len(content)):
        assert image_size(content[:length]) in (None, (40, 30)) or length < 30
    generator = np.random.default_rng(0)
    for _ in range(300):
        spoiled = bytearray(content)
        for place in generator.integers(4, len(content), 20):
            spoiled[place] = generator.integers(256)
        image_size(spoiled)


@pytest.mark.parametrize("content", [b"", b"text", b"GIF89a" + bytes(40), b"\xff\xd8\xff\xd9"])
def test_other_files(content: bytes) -> None:
    assert image_size(content) is None


def test_no_image_data_is_looked_at() -> None:
    """A frame after the start of the scan would be part of the picture."""
    content = encode(40, 30, "JPEG")
    frame = content.index(b"\xff\xc0")
    length = int.from_bytes(content[frame + 2 : frame + 4], "big") + 2
    without = content[:frame] + content[frame + length :]
    assert image_size(without + content[frame : frame + length]) is None


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_the_largest_of_each_format() -> None:
    assert image_size(png_header(100_000, 2**31 - 1)) == (100_000, 2**31 - 1)
    jpeg = bytearray(encode(40, 30, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff\xff\xff\xfe"
    assert image_size(jpeg) == (65_534, 65_535)
    lossy, lossless = bytearray(encode(40, 30, "WEBP")), bytearray(encode(4, 3, "WEBP", lossless=1))
    lossy[26:30] = b"\xff\xff\xff\xff"  # 14 bits, and 2 of a scale
    assert image_size(lossy) == (16_383, 16_383)
    lossless[21:25] = b"\xff\xff\xff\x0f"
    assert image_size(lossless) == (16_384, 16_384)
    extended = bytearray(encode(40, 30, "WEBP", icc_profile=b"profile"))
    extended[24:30] = b"\xff" * 6
    assert image_size(extended) == (2**24, 2**24)
