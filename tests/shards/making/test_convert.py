"""Conversion: what training decodes is not touched, and the rest becomes what it decodes."""

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageOps

from shards.decode import DecodeError, PixelRules, decode
from shards.errors import InputError
from shards.making.contents import Contents
from shards.making.convert import Converted, PixelOptions, convert
from shards.making.pack import Image
from shards.making.pictures import UnusableError
from shards.orientation import make_exif
from tests.conftest import draw_photo
from tests.shards.making.test_bit_depth import encode_values
from tests.shards.making.test_pictures import save
from tests.shards.test_dimensions import encode

# The command that packs turns these off.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

NONE = PixelOptions()
TWELVE = np.random.default_rng(0).integers(0, 4096, (20, 30)).astype(np.uint16)


def pixels(found: Converted) -> NDArray[np.uint8]:
    """Decode as training does."""
    content = bytearray(found.content)
    return decode(content, 0, len(content)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("side", [None, 30])
def test_what_training_decodes_is_taken_as_it_is(form: str, side: int | None) -> None:
    content = encode(30, 20, form)
    options = PixelOptions(max_side=side, window=(0, 9))
    for suffix, packed in (("jpg", "jpg"), ("JPEG", "jpeg"), ("png", "png"), ("webp", "webp")):
        assert convert(f"a/b.c.{suffix}", content, options) == (packed, content, "")
    own = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]
    for suffix in ("jfif", "gif", "tif"):
        assert convert(f"a.{suffix}", content, options) == (own, content, "")


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("suffix", ["jpg", "PNG", "gif", "bmp"])
def test_other_formats_become_png_under_any_name(form: str, suffix: str) -> None:
    content = encode(30, 20, form)
    found = convert(f"a.{suffix}", content, NONE)
    assert found.extension == "png"
    assert found.done == f"{'PNM' if form == 'PPM' else form} to PNG"
    expected = np.asarray(PillowImage.open(io.BytesIO(content)).convert("RGB"))
    assert (pixels(found) == expected).all()
    assert convert(f"a.{suffix}", content, NONE) == found


def test_animated_webp() -> None:
    frames = [PillowImage.fromarray(np.full((8, 9, 3), v, np.uint8)) for v in (50, 150)]
    content = save(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(DecodeError, match=r"animated WebP: launch/pack.py SOURCE OUT takes its"):
        decode(bytearray(content), 0, len(content))
    found = convert("a.webp", content, NONE)
    assert (pixels(found) == 50).all()
    assert found.done == "animated WebP to PNG"


# Shrinking


@pytest.mark.parametrize(("form", "name"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "png")])
def test_large_images_are_shrunk(form: str, name: str) -> None:
    content = encode(300, 200, form)
    found = convert("a.webp", content, PixelOptions(max_side=60))
    picture = PillowImage.open(io.BytesIO(content)).convert("RGB")
    expected = np.asarray(picture.resize((60, 40), PillowImage.Resampling.LANCZOS)).astype(int)
    assert found.extension == name
    assert pixels(found).shape == (40, 60, 3)
    assert np.abs(pixels(found) - expected).mean() < 2
    assert "shrunk to 60 pixels" in found.done
    assert convert("a.webp", content, PixelOptions(max_side=60)) == found


def test_extreme_shapes_keep_a_pixel() -> None:
    content = save(PillowImage.new("L", (2000, 3), 77), "PNG")
    assert (pixels(convert("a.png", content, PixelOptions(max_side=10))) == 77).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_the_orientation_stays_beside_the_pixels(form: str, orientation: int) -> None:
    content = encode(300, 200, form, exif=make_exif(orientation))
    found = bytearray(convert("a.jpg", content, PixelOptions(max_side=60)).content)
    picture = PillowImage.open(io.BytesIO(content)).convert("RGB")
    small = picture.resize((60, 40), PillowImage.Resampling.LANCZOS)
    small.getexif()[0x0112] = orientation
    for rules, expected in (
        (PixelRules(), small),
        (PixelRules(exif="apply"), ImageOps.exif_transpose(small)),
    ):
        values = decode(found, 0, len(found), rules).permute(1, 2, 0).numpy().astype(int)
        assert values.shape == np.asarray(expected).shape
        assert np.abs(values - np.asarray(expected)).mean() < 2


# More than 8 bits


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_a_window_is_applied_once(form: str) -> None:
    content = encode_values(TWELVE, form)
    found = convert("a.png", content, PixelOptions(window=(0, 4095)))
    expected = np.rint(TWELVE * (255 / 4095))
    assert (pixels(found) == expected[..., None]).all()
    assert found.done == f"{form} of more than 8 bits to PNG"
    assert convert("b.png", found.content, PixelOptions(window=(0, 9))).content == found.content


def test_a_missing_window_is_asked_for() -> None:
    content = encode_values(TWELVE, "PNG")
    text = rf"SOURCE a/b.png: .* {TWELVE.min()} to {TWELVE.max()}: .* --window {TWELVE.min()} "
    with pytest.raises(InputError, match=text):
        convert("a/b.png", content, NONE)


def test_scaled_up_images_need_none() -> None:
    narrow = (TWELVE >> 4).astype(np.uint16)
    found = convert("a.png", encode_values(narrow * 257, "PNG"), NONE)
    assert (pixels(found) == narrow[..., None]).all()


# Faults


def spoil(content: bytes, seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    spoiled = bytearray(content)
    for place in generator.integers(2, len(content), 1 + seed % 20):
        spoiled[place] = generator.integers(256)
    return bytes(spoiled)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        *((form, {}) for form in ("GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "JPEG", "PNG")),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
    ],
)
def test_damaged_images_have_one_of_a_few_reasons(form: str, options: dict[str, Any]) -> None:
    content = encode(60, 50, form, **options)
    damaged = [content[:length] for length in range(0, len(content), 1 + len(content) // 40)]
    damaged += [spoil(content, seed) for seed in range(60)]
    reasons = set()
    for one in damaged:
        try:
            convert(f"a.{form.lower()}", one, PixelOptions(max_side=40, window=(0, 9)))
        except UnusableError as error:
            reasons.add(str(error))
    assert len(reasons) < 8
    assert all("\n" not in reason for reason in reasons)
    assert reasons


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    content = encode(30, 20, "GIF")
    monkeypatch.setattr(PillowImage.Image, "convert", fail)
    with pytest.raises(UnusableError, match="too large for the memory"):
        convert("a.gif", content, NONE)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF"])
def test_the_pixel_limit(form: str) -> None:
    content = encode(30, 20, form)
    convert("a.jpg", content, PixelOptions(max_pixels=600))
    with pytest.raises(UnusableError, match="more than 599 pixels: raise --max-pixels, and data"):
        convert("a.jpg", content, PixelOptions(max_pixels=599))
    convert("a.jpg", draw_photo(0, 9, 9), PixelOptions(max_pixels=599))


def test_images_that_are_stored_turned_are_counted() -> None:
    contents = Contents(PixelOptions())
    for number, orientation in enumerate((1, 6, 3)):
        exif = encode(30, 20, "JPEG", exif=make_exif(orientation))
        contents.convert(Image(f"{number}.jpg", len(exif), -1), exif)
    (line,) = contents.list_turned()
    assert line.startswith("2 images are stored turned, such as 1.jpg: --data.exif apply")
    assert not list(Contents(PixelOptions()).list_turned())
