"""Pictures in other formats: the pixels that went in, as training's decoder shows them."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage
from PIL import features

from shards.decode import decode
from shards.making.pictures import UnusableError, read_picture, read_wide
from tests.helpers.pngs import encode_by_hand
from tests.helpers.tiffs import encode_color_tiff
from tests.shards.making.test_bit_depth import encode_values

# The command that packs turns these off.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

MOST = 10_000
COLORS = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
WIDE = np.random.default_rng(1).integers(0, 65536, (20, 30, 4)).astype(np.uint16)


def save(picture: PillowImage.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("BMP", {}),
        ("DIB", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
        ("TGA", {}),
        ("JPEG2000", {"irreversible": False}),
        ("WEBP", {"lossless": True}),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_lossless_formats(form: str, options: dict[str, Any], mode: str) -> None:
    expected = PillowImage.fromarray(COLORS).convert(mode)
    found = read_picture(save(expected, form, **options), form.lower(), MOST)
    values = np.asarray(PillowImage.fromarray(found.values).convert(mode))
    assert (values == np.asarray(expected)).all()
    assert found.orientation == 1


def test_first_frames() -> None:
    frames = [PillowImage.fromarray(np.full((8, 9, 3), v, np.uint8)) for v in (50, 150, 250)]
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        content = save(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert (read_picture(content, "", MOST).values == 50).all()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif() -> None:
    smooth = PillowImage.fromarray(COLORS[:5, :7]).resize((70, 50), PillowImage.Resampling.BICUBIC)
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    found = read_picture(save(smooth, "AVIF", quality=95, exif=exif), "avif", MOST)
    assert np.abs(found.values.astype(int) - np.asarray(smooth)).mean() < 4
    assert found.orientation == 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("transparency", [False, True])
def test_modes_are_read_as_training_reads_a_png(mode: str, transparency: bool) -> None:
    """The training's decoder drops transparency, and so does Pillow here."""
    picture = PillowImage.fromarray(COLORS).convert(mode)
    if mode.endswith("A"):
        picture.putalpha(PillowImage.fromarray(COLORS[..., 0]))
    options = {"transparency": bytes(range(256))} if transparency and mode == "P" else {}
    content = save(picture, "PNG", **options)
    expected = decode(bytearray(content), 0, len(content)).permute(1, 2, 0).numpy()
    form = "GIF" if mode == "P" else "TIFF"
    found = read_picture(save(picture, form, **({"transparency": 3} if options else {})), "", MOST)
    values = found.values if found.values.ndim == 3 else found.values[..., None]
    assert (values == expected).all()


def test_cmyk_is_converted_by_the_simple_formula() -> None:
    picture = PillowImage.fromarray(COLORS).convert("CMYK")
    found = read_picture(save(picture, "TIFF"), "tif", MOST).values
    assert np.abs(found.astype(int) - COLORS).max() <= 1


def test_what_turns_a_tiff_is_part_of_the_format() -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    found = read_picture(save(PillowImage.fromarray(COLORS), "TIFF", exif=exif), "tif", MOST)
    assert (found.values == np.rot90(COLORS, -1)).all()
    assert found.orientation == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>", "an HTML or XML page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no header of an image"),
        (b"%PDF-1.4", "no header of an image"),
        (save(PillowImage.fromarray(COLORS).convert("LAB"), "TIFF"), "a TIFF in the mode LAB, not"),
        (save(PillowImage.new("L", (101, 100)), "BMP"), "more than 10,000 pixels: raise --max-pix"),
        (save(PillowImage.new("L", (300, 100)), "GIF"), "more than 10,000 pixels: raise --max-pix"),
    ],
)
def test_what_cannot_be_used(content: bytes, reason: str) -> None:
    limit = PillowImage.MAX_IMAGE_PIXELS
    with pytest.raises(UnusableError) as caught:
        read_picture(content, "gif", MOST)
    assert str(caught.value).startswith(reason)
    assert limit == PillowImage.MAX_IMAGE_PIXELS


# More than 8 bits


@pytest.mark.parametrize(
    "content",
    [
        encode_values(WIDE[..., 0], "PNG"),
        encode_values(WIDE[..., 0], "TIFF"),
        encode_values(WIDE[..., 0], "TIFF", compression="tiff_lzw"),
        encode_values(WIDE[..., 0].astype(np.int32), "TIFF"),
        encode_values(WIDE[..., 0].astype(np.float32), "TIFF"),
        encode_values(WIDE[..., 0], "JPEG2000", irreversible=False),
        b"P5\n# a comment\n30 20\n65535\n" + WIDE[..., 0].astype(">u2").tobytes(),
    ],
)
def test_wide_gray(content: bytes) -> None:
    assert (read_wide(content, "", MOST).values == WIDE[..., 0]).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_wide_pngs(channels: int) -> None:
    found = read_wide(encode_by_hand(WIDE[..., :channels], 16), "png", MOST).values
    assert (found == (WIDE[..., 0] if channels < 3 else WIDE[..., :3])).all()


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
def test_wide_color_tiffs(channels: int, order: str, deflate: bool) -> None:
    """Pillow keeps the high byte alone."""
    content = encode_color_tiff(WIDE[..., :channels], order, deflate)
    assert (read_wide(content, "tif", MOST).values == WIDE[..., :3]).all()


def test_wide_color_pnm() -> None:
    content = b"P6 30 20 65535\n" + WIDE[..., :3].astype(">u2").tobytes()
    assert (read_wide(content, "ppm", MOST).values == WIDE[..., :3]).all()


def test_white_may_be_zero() -> None:
    content = encode_values(WIDE[..., 0], "TIFF", tiffinfo={262: 0})
    assert (read_wide(content, "tif", MOST).values == 65535 - WIDE[..., 0]).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_wide_pictures_are_bounded(form: str) -> None:
    content = encode_values(np.zeros((101, 100), np.uint16), form)
    with pytest.raises(UnusableError, match="more than 10,000 pixels"):
        read_wide(content, "", MOST)
    assert read_wide(content, "", MOST + 100).values.shape == (101, 100)
