"""Bits per channel from headers: those that the files were written with."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from shards.making.bit_depth import find_bit_depth
from tests.helpers.tiffs import encode_color_tiff
from tests.shards.test_dimensions import encode

WIDE = np.arange(600, dtype=np.uint16).reshape(20, 30)


def encode_values(values: Any, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(values).save(buffer, form, **options)
    return buffer.getvalue()


def depth_of(content: bytes) -> int:
    return find_bit_depth(lambda start, stop: content[start:stop])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_eight_bits_and_fewer(form: str) -> None:
    assert depth_of(encode(30, 20, form)) == 8
    if form not in ("JPEG", "WEBP", "JPEG2000"):
        buffer = io.BytesIO()
        PillowImage.new("1", (30, 20)).save(buffer, form)
        assert depth_of(buffer.getvalue()) in (1, 8)


@pytest.mark.parametrize(
    ("content", "depth"),
    [
        (encode_values(WIDE, "PNG"), 16),
        (encode_values(WIDE, "TIFF"), 16),
        (encode_values(WIDE, "TIFF", compression="tiff_lzw"), 16),
        (encode_values(WIDE, "TIFF", big_tiff=True), 16),
        (encode_values(WIDE.astype(np.int32), "TIFF"), 32),
        (encode_values(WIDE.astype(np.float32), "TIFF"), 32),
        (encode_values(WIDE, "JPEG2000"), 16),
        (encode_values(WIDE, "JPEG2000", no_jp2=True), 16),
        (encode_color_tiff(np.zeros((4, 5, 3), np.uint16)), 16),
        (encode_color_tiff(np.zeros((4, 5, 4), np.uint16), ">"), 16),
        (b"P5\n# by a scanner\n30 20 # size\n4095\n" + bytes(1200), 12),
        (b"P6 30 20 65535\n" + bytes(3600), 16),
        (b"P6 30 20 255\n" + bytes(3600), 8),
        (b"Pf\n30 20\n-1.0\n" + bytes(2400), 32),
    ],
)
def test_more_than_eight_bits(content: bytes, depth: int) -> None:
    assert depth_of(content) == depth


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG2000"])
def test_what_is_cut_or_random_raises_nothing(form: str) -> None:
    content = encode_values(WIDE, form)
    for length in range(0, len(content), 7):
        depth_of(content[:length])
    generator = np.random.default_rng(0)
    for _ in range(300):
        spoiled = bytearray(content)
        for place in generator.integers(4, len(content), 20):
            spoiled[place] = generator.integers(256)
        depth_of(bytes(spoiled))
