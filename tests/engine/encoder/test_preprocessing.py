"""What a card says of the input can be executed, and gives the pixels that evaluations see."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image as PillowImage
from torch import Tensor

from engine.encoder import card
from engine.evaluation.during_training import ProbeConfig
from engine.method.augment import MEAN, STD, normalize
from launch import export
from shards.center_crops import CropReader
from shards.decode import PixelRules
from shards.errors import InputError
from shards.loader import DataConfig
from shards.orientation import make_exif
from tests.conftest import PackFiles, draw_photo
from tests.helpers import tiny
from tests.helpers.places import ROOT
from tests.helpers.training import train

CARD: dict[str, Any] = {"input": {"size": 24, "resize_shorter_side": 27, "crop_fraction": 0.9}}


def turned_photo() -> bytes:
    """A JPEG of 60 x 40 pixels whose EXIF data say that it must be turned."""
    buffer = io.BytesIO()
    picture = PillowImage.open(io.BytesIO(draw_photo(3, 60, 40)))
    picture.save(buffer, "JPEG", exif=make_exif(6))
    return buffer.getvalue()


def with_input(**fields: Any) -> dict[str, Any]:
    return {"input": CARD["input"] | fields}


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_it_gives_what_evaluations_see(exif: Any, tmp_path: Path, pack_files: PackFiles) -> None:
    photos = {f"ant/{i}.jpg": draw_photo(i, 40 + 7 * i, 60) for i in range(4)}
    photos["ant/turned.jpg"] = turned_photo()
    photos["ant/gray.png"] = gray_png()
    index = pack_files(f"{tmp_path}/packed", photos)
    reader = CropReader(24, 0.9, 1, 0, print, rules=PixelRules(exif=exif))
    seen = torch.cat([batch.images for batch in reader.read(index)])
    expected = {row.numpy().tobytes() for row in normalize(seen.float() / 255).contiguous()}
    transform = card.transform(with_input(exif_orientation=exif))
    for path, content in photos.items():
        place = tmp_path / Path(path).name
        place.write_bytes(content)
        picture = PillowImage.open(place)
        for image in (place, str(place), picture):
            assert transform(image).numpy().tobytes() in expected, path
        if exif == "ignore":
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
            assert transform(pixels).numpy().tobytes() in expected, path


def gray_png() -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(np.arange(2000, dtype=np.uint8).reshape(40, 50)).save(buffer, "PNG")
    return buffer.getvalue()


def readme_transform(folder: Path) -> Any:
    """The lines of launch/README.md that do the same without this package."""
    text = (ROOT / "launch" / "README.md").read_text()
    (code,) = re.findall(r"<!-- transform -->\n```python\n(.*?)^```$", text, re.S | re.M)
    names: dict[str, Any] = {}
    exec(code.replace("card.json", f"{folder}/card.json"), names)
    return names["transform"]


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_the_lines_of_the_readme_give_the_same(exif: str, tmp_path: Path) -> None:
    found = with_input(exif_orientation=exif, mean=list(MEAN), std=list(STD))
    (tmp_path / "card.json").write_text(json.dumps(found))
    transform, theirs = card.transform(str(tmp_path / "card.json")), readme_transform(tmp_path)
    for name, content in (
        ("a.jpg", draw_photo(1, 90, 61)),
        ("b.jpg", turned_photo()),
        ("c.png", gray_png()),
    ):
        (tmp_path / name).write_bytes(content)
        torch.testing.assert_close(
            theirs(str(tmp_path / name)), transform(tmp_path / name), rtol=0, atol=1e-6
        )


def test_antialiasing_gives_other_pixels(tmp_path: Path) -> None:
    """torchvision's default would be noticed by the test above."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    place = tmp_path / "noise.png"
    PillowImage.fromarray(noise).save(place)
    exact = card.transform(with_input(crop_fraction=1.0))(place)
    resize = torchvision.transforms.Resize(
        24, torchvision.transforms.InterpolationMode.BICUBIC, antialias=True
    )
    other = resize(torch.from_numpy(noise).permute(2, 0, 1)).float() / 255
    assert (normalize(other[None])[0] - exact).abs().mean() > 0.1


def test_an_exported_card_is_executed(tiny_data: DataConfig, tmp_path: Path) -> None:
    """Its features of a file are those of the run's network on the evaluation's crop."""
    run = str(tmp_path / "run")
    assert train(tiny.recipe(tiny_data, run, steps=1, probe=tiny.NO_PROBE))
    assert export.main([run, f"{tmp_path}/out", "--format", "safetensors"]) == 0
    written = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (written["input"]["size"], written["input"]["crop_fraction"]) == (32, 0.875)
    found = card.transform(written)
    assert (found.size, found.crop, found.rules) == (32, 0.875, PixelRules())


@pytest.mark.parametrize("given", [True, False])
def test_the_images_of_the_probe_are_taken_where_there_is_no_val(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, given: bool
) -> None:
    run = str(tmp_path / "run")
    data = replace(tiny_data, val="")
    probe = ProbeConfig(every=1, train=tiny_data.train, val=tiny_data.val) if given else None
    assert train(tiny.recipe(data, run, steps=1, probe=probe or tiny.NO_PROBE))
    capsys.readouterr()
    assert export.main([run, f"{tmp_path}/out", "--format", "safetensors"]) == 0
    told = capsys.readouterr().out
    assert (f"data.val is the run's probe.val: {tiny_data.val}\n" in told) == given
    assert ("compared on random images only: give --data.val URL" in told) == (not given)
    written = json.loads((tmp_path / "out" / "card.json").read_text())
    assert written["compared_on_images"] == (2 if given else 1) * card.IMAGES


def test_exports_are_compared_on_a_plain_folder(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of any format that packing takes; what cannot be decoded is told."""
    run, photos = str(tmp_path / "run"), tmp_path / "photos"
    assert train(tiny.recipe(tiny_data, run, steps=1, probe=tiny.NO_PROBE))
    photos.mkdir()
    for number in range(3):
        PillowImage.new("RGB", (40, 50), (number, 9, 9)).save(photos / f"{number}.gif")
    (photos / "broken.jpg").write_text("none")
    command = [run, f"{tmp_path}/out", "--format", "safetensors", "--data.val", str(photos)]
    capsys.readouterr()
    assert export.main(command) == 0
    assert f"{photos}/broken.jpg: " in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "card.json").read_text())
    assert written["compared_on_images"] == card.IMAGES + 3

    PillowImage.fromarray(np.full((40, 40), 4000, np.uint16)).save(photos / "deep.png")
    assert export.main([*command, "--overwrite"]) == 1
    assert f"data.val {photos}/deep.png: has more than 8 bits" in capsys.readouterr().err
    for path in photos.iterdir():
        path.write_text("none")
    assert export.main([*command, "--overwrite"]) == 1
    assert "none of its images can be decoded" in capsys.readouterr().err


def test_cards_of_the_first_release_are_read() -> None:
    """They have no fraction, but a rounded side, and the recipe."""
    old = {"input": {"size": 32, "resize_shorter_side": 37}}
    assert card.transform(old).crop == 0.875
    assert card.transform(old | {"recipe": {"probe.crop": 0.87}}).crop == 0.87
    assert card.transform({"input": {"size": 32, "resize_shorter_side": 32}}).crop == 1
    other = {"input": {"size": 224, "resize_shorter_side": 240}, "recipe": {"probe.crop": 0.5}}
    assert card.transform(other).crop == 224 / 240


def test_the_largest_image_is_that_of_the_run(tmp_path: Path) -> None:
    place = tmp_path / "photo.jpg"
    place.write_bytes(draw_photo(3, 60, 40))
    assert card.transform(with_input(max_pixels=2400))(place).shape == (3, 24, 24)
    with pytest.raises(InputError, match="2,399"):
        card.transform(with_input(max_pixels=2399))(place)


def test_mistakes_are_told(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_bytes(b"no image")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "lacks input"),
        ({"input": {}}, "input lacks size"),
        (with_input(size=0), "input.size"),
        (with_input(exif_orientation="turn"), "input.exif_orientation"),
        (with_input(mean=[0.5, 0.5, 0.5]), "input.mean"),
    ]
    for document, text in wrong:
        with pytest.raises(InputError, match=re.escape(text)):
            card.transform(document)
    with pytest.raises(InputError, match="no such file"):
        card.transform(tmp_path / "card.json")
    transform = card.transform(CARD)
    images: list[tuple[Any, str]] = [
        (tmp_path / "text.jpg", "no header of an image"),
        (torch.zeros(3, 8, 8), "must be uint8"),
        (torch.zeros(8, 8, dtype=torch.uint8), "must be uint8"),
        (PillowImage.new("I;16", (8, 8)), "mode I;16 has no 8 bits"),
    ]
    for image, text in images:
        with pytest.raises(InputError, match=text):
            transform(image)


def test_a_tensor_may_be_gray() -> None:
    image = torch.arange(900, dtype=torch.uint8).reshape(1, 30, 30)
    found: Tensor = card.transform(CARD)(image)
    assert torch.equal(found, card.transform(CARD)(image.repeat(3, 1, 1)))
