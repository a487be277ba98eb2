"""Decoding: what claims absurd dimensions is refused before memory is taken for it."""

import resource

import pytest

from shards.decode import DecodeError, decode
from shards.dimensions import MOST_PIXELS
from tests.shards.test_dimensions import encode, png_header


def patched(content: bytes, mark: bytes, offset: int, new: bytes) -> bytearray:
    """With `new` at `offset` behind where `mark` begins."""
    result = bytearray(content)
    at = content.index(mark) + offset
    result[at : at + len(new)] = new
    return result


BOMBS = {
    "png": bytearray(png_header(100_000, 100_000) + encode(40, 30, "PNG")[33:]),
    "jpeg": patched(encode(40, 30, "JPEG"), b"\xff\xc0", 5, b"\xff\xdc\xff\xdc"),
    "progressive": patched(
        encode(40, 30, "JPEG", progressive=True), b"\xff\xc2", 5, b"\xff\xdc\xff\xdc"
    ),
    "webp": patched(encode(40, 30, "WEBP"), b"VP8 ", 14, b"\xff\x3f\xff\x3f"),
    "lossless": patched(encode(40, 30, "WEBP", lossless=True), b"VP8L", 9, b"\xff\xff\xff\x0f"),
    "extended": patched(encode(40, 30, "WEBP", icc_profile=b"p"), b"VP8X", 12, b"\xff" * 6),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError, match=r"\d+ x \d+ pixels, more than 89,478,485"):
        decode(BOMBS[name], 0, len(BOMBS[name]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_the_bound_itself_is_allowed() -> None:
    """A wide image just below the bound fails for its missing rows, not for its size."""
    for width, text in ((MOST_PIXELS, None), (MOST_PIXELS + 1, "more than")):
        content = bytearray(png_header(width, 1) + encode(40, 30, "PNG")[33:])
        with pytest.raises(DecodeError, match=text) as caught:
            decode(content, 0, len(content))
        assert ("more than" in str(caught.value)) == (text is not None)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_images_between_other_bytes(form: str) -> None:
    content = encode(50, 40, form)
    image = decode(bytearray(b"---" + content + b"---"), 3, len(content))
    assert image.shape == (3, 40, 50)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_no_images(form: str) -> None:
    content = bytearray(encode(50, 40, form))
    with pytest.raises(DecodeError, match="no JPEG, PNG or WebP image"):
        decode(content, 0, len(content))


def test_reasons_are_one_line() -> None:
    content = bytearray(encode(50, 40, "JPEG")[:600])
    with pytest.raises(DecodeError) as caught:
        decode(content, 0, len(content))
    assert "\n" not in str(caught.value)
