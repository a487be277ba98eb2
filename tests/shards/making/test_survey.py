"""More than 8 bits: asked for a window before anything is written, and packed by it."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from launch import pack as pack_command
from shards import index
from shards.center_crops import CropReader
from shards.errors import InputError
from shards.making import contents, survey
from tests.conftest import draw_photo
from tests.shards.making.test_bit_depth import encode_values

VALUES = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16) * 16  # 12 bits


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six wide images of the values 0 to 4080, in two forms, and two others."""
    folder = tmp_path / "in"
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        (folder / name / "photo.png").write_bytes(draw_photo(0, 16, 16, "PNG"))
        for i in range(3):
            form = "TIFF" if i == 2 else "PNG"
            suffix = "tif" if i == 2 else "png"
            (folder / name / f"{i}.{suffix}").write_bytes(encode_values(VALUES, form))
    return folder


def pack(source: Path, out: Path, **options: object) -> index.Index:
    pack_command.main((str(source), str(out)), threads=2, **options)  # type: ignore[arg-type]
    return index.load(str(out), "data.train")


def levels(found: index.Index) -> list[int]:
    """The numbers of gray levels of the images."""
    (batch,) = CropReader(16, 1.0, 1, 0.0, pytest.fail).read(found)
    return sorted(len(image.unique()) for image in batch.images[:, 0])


def test_without_a_window_nothing_is_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        pack(source, out)
    text = str(caught.value)
    assert text.startswith(f"SOURCE {source}: 6 of its images, such as ant/0.png, have more than 8")
    assert "values from 0 to 4080: " in text
    assert "--window LOW HIGH, such as --window 0 4080, or --window-percentiles 1 99" in text
    assert not out.exists()


def test_a_window_is_applied_and_recorded(source: Path, tmp_path: Path) -> None:
    wide = pack(source, tmp_path / "wide", window=(0.0, 4080.0))
    assert wide.pixels == {"window": [0.0, 4080.0]}
    assert levels(wide)[2:] == [256] * 6
    half = pack(source, tmp_path / "half", window=(0.0, 2040.0))
    assert levels(half)[:6] == [129] * 6
    assert len({wide.digest, half.digest}) == len({wide.plan, half.plan}) == 2
    pack_command.main((str(tmp_path / "wide"),), index_only=True)
    assert index.load(str(tmp_path / "wide"), "data.train").digest == wide.digest
    document = json.loads((tmp_path / "wide" / index.NAME).read_text())
    assert document["pixels"] == {"window": [0.0, 4080.0]}
    document["pixels"] = {"window": [0.0, 1.0]}
    (tmp_path / "wide" / index.NAME).write_text(json.dumps(document))
    with pytest.raises(InputError, match="does not match its own digest"):
        index.load(str(tmp_path / "wide"), "data.train")
    with pytest.raises(InputError, match=r"holds other shards .*pixels\)"):
        pack(source, tmp_path / "half", window=(0.0, 4080.0))


def test_packing_by_a_window_goes_on_and_stands(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = pack(source, tmp_path / "a", window=(0.0, 4080.0))
    assert "converted: 4 PNG of more than 8 bits to PNG, such as " in capsys.readouterr().err
    pack(source, tmp_path / "a", window=(0.0, 4080.0))
    assert capsys.readouterr().out.startswith("already packed: ")
    second = pack(source, tmp_path / "b", window=(0.0, 4080.0))
    assert first.digest == second.digest
    names = [shard.name for shard in first.shards]
    a, b = ([(tmp_path / where / n).read_bytes() for n in names] for where in "ab")
    assert a == b


def test_percentiles(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = pack(source, tmp_path / "out", window_percentiles=(25.0, 75.0))
    low, high = np.percentile(VALUES, (25, 75)).tolist()
    assert found.pixels == {"window": [low, high]}
    assert f"the values {low:g} and {high:g}" in capsys.readouterr().err
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "0.png").write_bytes(encode_values(VALUES * 0 + 7, "PNG"))
    with pytest.raises(InputError, match=r"--window-percentiles: both are the value 7 in 1 of"):
        pack(tmp_path / "flat", tmp_path / "other", window_percentiles=(1.0, 99.0))


def test_only_some_are_measured(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "MEASURED", 2)
    (source / "ant" / "0.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"5 of its images \(in 2 of them\), such as ant/1.png"):
        pack(source, tmp_path / "out")
    monkeypatch.setattr(survey, "LOOKED_AT", 4)
    with pytest.raises(
        InputError, match=r": [1-4] of 4 of its images .*such as .*, have more than"
    ):
        pack(source, tmp_path / "out")


def test_images_of_eight_bits_need_none(source: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    for i in range(4):
        (plain / "ant").mkdir(parents=True, exist_ok=True)
        (plain / "ant" / f"{i}.png").write_bytes(draw_photo(i, 16, 16, "PNG"))
    assert pack(plain, tmp_path / "out").pixels == {}
    scaled = (VALUES >> 4) * 257
    (plain / "ant" / "0.png").write_bytes(encode_values(scaled, "PNG"))
    found = pack(plain, tmp_path / "scaled")
    assert found.pixels == {}
    assert levels(found)[-1] == 256
    assert source.exists()


def test_a_wide_image_under_another_name_is_found_while_packing(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "0.jpg").write_bytes((source / "ant" / "0.png").read_bytes())
    with pytest.raises(InputError, match=r"SOURCE 0.jpg: it has .* 0 to 4080: .* --window LOW"):
        pack(tmp_path / "plain", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": (5.0, 5.0)}, "--window must be two rising numbers, not 5 5"),
        ({"window": (float("nan"), 5.0)}, "--window must be two rising numbers, not nan 5"),
        ({"window_percentiles": (1.0, 101.0)}, "--window-percentiles must be .* from 0 to 100"),
        ({"window": (1.0, 2.0), "window_percentiles": (1.0, 2.0)}, "exclude each other"),
        ({"max_side": 0}, "--max-side must be from 1 to 65536, not 0"),
        ({"max_pixels": 0}, "--max-pixels must be from 1"),
    ],
)
def test_impossible_options(
    source: Path, tmp_path: Path, options: dict[str, object], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        pack(source, tmp_path / "out", **options)


def test_index_only_has_no_pixels_to_convert(source: Path) -> None:
    for options in ({"window": (0.0, 9.0)}, {"max_side": 9}, {"max_pixels": 9}):
        with pytest.raises(InputError, match="--index-only copies no images: leave"):
            pack_command.main((str(source),), index_only=True, **options)


def test_what_training_has_to_admit_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "MOST_PIXELS", 5000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(draw_photo(2, 100, 51, "PNG"))
    pack(tmp_path / "in", tmp_path / "out")
    text = " ".join(capsys.readouterr().err.split())
    assert "0.png has 5,100 pixels: train with --data.max-pixels 5100, or shrink it" in text


def test_shrinking_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    small, large = draw_photo(0, 30, 20), draw_photo(1, 200, 100)
    (folder / "small.jpg").write_bytes(small)
    (folder / "large.jpg").write_bytes(large)
    (folder / "huge.png").write_bytes(draw_photo(2, 300, 100, "PNG"))
    found = pack(folder, tmp_path / "out", max_side=64, max_pixels=25_000)
    assert found.pixels == {"max_pixels": 25_000, "max_side": 64}
    text = " ".join(capsys.readouterr().err.split())
    assert "converted: 1 JPEG, shrunk to 64 pixels, such as large.jpg" in text
    assert "cannot be decoded: 1 of 3 images (more than 25,000 pixels: raise --max-pixels" in text
    content = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    assert small in content
    assert large not in content
    sizes = [
        PillowImage.open(io.BytesIO(content[at:])).size for at in find_all(content, b"\xff\xd8")
    ]
    assert (64, 32) in sizes


def find_all(content: bytes, mark: bytes) -> list[int]:
    """The members of a tar that begin with a mark."""
    return [at for at in range(0, len(content), 512) if content[at:].startswith(mark)]
