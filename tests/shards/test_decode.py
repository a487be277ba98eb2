"""Decoding: what claims absurd dimensions is refused before memory is taken for it."""

import io
import resource

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageOps

from shards.decode import Box, DecodeError, PixelRules, crop_into, crop_resize, decode
from shards.dimensions import MOST_PIXELS
from shards.orientation import exif_orientation, image_orientation, make_exif
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
    with pytest.raises(
        DecodeError, match=r"\d+ x \d+ pixels, more than data.max_pixels \(89,478,485\)"
    ):
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


def test_the_bound_is_a_rule() -> None:
    content = bytearray(encode(50, 40, "PNG"))
    assert decode(content, 0, len(content), PixelRules(max_pixels=2000)).shape == (3, 40, 50)
    with pytest.raises(DecodeError, match=r"50 x 40 pixels, more than data.max_pixels \(1,999\)"):
        decode(content, 0, len(content), PixelRules(max_pixels=1999))


# EXIF orientation


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_ignored_or_applied(form: str, orientation: int) -> None:
    """Pillow turns the image for comparison."""
    content = bytearray(encode(50, 40, form, exif=make_exif(orientation)))
    picture = PillowImage.open(io.BytesIO(content)).convert("RGB")
    assert picture.getexif()[274] == orientation
    upright = ImageOps.exif_transpose(picture)
    for rules, expected in ((PixelRules(), picture), (PixelRules(exif="apply"), upright)):
        image = decode(content, 0, len(content), rules).permute(1, 2, 0).numpy()
        assert image.shape == np.asarray(expected).shape
        assert np.abs(image.astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("exif", [b"", b"text", make_exif(9), make_exif(0), make_exif(6)[:-9]])
def test_damaged_orientations_are_upright(exif: bytes) -> None:
    assert exif_orientation(exif) == 1
    for content in (
        encode(50, 40, "WEBP", exif=exif),
        b"RIFF",
        b"RIFF\0\0\0\0WEBPEXIF\xff\xff\xff\xff",
    ):
        assert image_orientation(content) == 1
        assert image_orientation(memoryview(content)) == 1


# 16 bits


def encode_wide(values: NDArray[np.int64]) -> bytearray:
    buffer = io.BytesIO()
    PillowImage.fromarray(values.astype(np.uint16)).save(buffer, "PNG")
    return bytearray(buffer.getvalue())


def test_scaled_up_values_are_what_they_were() -> None:
    narrow = np.arange(256).reshape(16, 16)
    content = encode_wide(narrow * 257)
    for rules in (PixelRules(), PixelRules(exif="apply")):
        assert (decode(content, 0, len(content), rules).numpy() == narrow).all()


def test_other_values_need_a_window() -> None:
    values = np.arange(256).reshape(16, 16) * 257
    values[7, 7] += 1
    content = encode_wide(values)
    with pytest.raises(DecodeError, match=r"16 bits .* a window: .*pack.py SOURCE OUT --window"):
        decode(content, 0, len(content))


@pytest.mark.parametrize("layout", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize(
    "box", [(0, 0, 40, 50), (3, 7, 30, 31), (5, 0, 20, 50), (9, 8, 24, 24), (1, 49, 7, 1)]
)
def test_a_crop_is_written_where_it_belongs(layout: tuple[int, ...], box: Box) -> None:
    shape = [(3, 40, 50)[axis] for axis in layout]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, [2, *shape], np.uint8))
    # [3, 40, 50] in each order in memory, behind another image
    image = pixels[1].permute(*map(layout.index, range(3)))
    rows = torch.zeros(3, 24, 24, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    crop_into(rows[1:2], image, box)
    top, left, height, width = box
    cut = image[None, :, top : top + height, left : left + width].contiguous()
    expected = F.interpolate(cut, (24, 24), mode="bicubic", align_corners=False)[0]
    assert torch.equal(rows[1], expected)
    assert torch.equal(rows[1], crop_resize(image, box, 24))
    assert not rows[::2].any()
