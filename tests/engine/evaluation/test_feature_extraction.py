"""launch/evaluate.py features: what the files hold, for any data, format and process count."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from safetensors.torch import load, load_file

from engine.encoder import card
from engine.encoder.source import open_encoder
from engine.evaluation import feature_extraction, feature_files, feature_parts
from engine.evaluation.features import extract
from engine.method.augment import normalize
from launch import evaluate, export
from shards import index as indexes
from shards.center_crops import CropReader
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.helpers import tiny
from tests.helpers.training import train


@pytest.fixture(scope="module")
def run(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("features") / "run")
    assert train(tiny.recipe(tiny_data, url, probe=tiny.NO_PROBE))
    return url


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 10 images, so that little data has many."""
    monkeypatch.setattr(feature_extraction, "LEAST_ROWS", 10)
    monkeypatch.setattr(feature_extraction, "BATCH", 4)


def features(*arguments: str) -> int:
    return evaluate.main(["features", *arguments, "--threads", "1"])


def npz(url: str) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(files.read(url)), allow_pickle=False) as archive:
        return dict(archive)


def index_of(url: str) -> dict[str, Any]:
    document: dict[str, Any] = files.read_json(url)
    return document


def unpack(data: str, folder: Path, form: str = "PNG") -> Path:
    """Write the images of shards as files, in a folder for each class."""
    index = indexes.load(data, "data")
    crops = CropReader(32, 1.0, 1, 0, print).read(index)
    for batch in crops:
        for image, label, number in zip(*batch, strict=True):
            place = folder / index.classes[label] / f"a{int(number):03d}.{form.lower()}"
            place.parent.mkdir(parents=True, exist_ok=True)
            PillowImage.fromarray(image.permute(1, 2, 0).numpy()).save(place, form)
    return folder


@pytest.mark.usefixtures("small_parts")
def test_shards_to_one_file(run: str, tiny_data: DataConfig, store: str) -> None:
    """The rows are those of kNN, in the order of the samples."""
    out = f"{store}/out/found.npz"
    assert features(run, tiny_data.train, out) == 0
    found = npz(out)
    index = indexes.load(tiny_data.train, "data")
    assert found["ids"].tolist() == list(range(tiny.SAMPLES))
    assert found["classes"].tolist() == index.classes
    assert found["features"].shape == (tiny.SAMPLES, 64)
    assert re.fullmatch(r"0*0_\w+", str(found["names"][0]))
    state = export_of(run)
    crops = CropReader(32, 0.875, 1, 0, print).read(index)
    bank = extract(lambda x: forward(state, x), crops, torch.device("cpu"))
    assert found["labels"].tolist() == bank.labels.tolist()
    np.testing.assert_allclose(found["features"], bank.features.numpy(), rtol=1e-4, atol=1e-5)
    facts = index_of(f"{store}/out/found.npz.json")
    assert facts["files"] == [{"name": "found.npz", "rows": tiny.SAMPLES}]
    assert (facts["rows"], facts["shape"], facts["left_out"]) == (tiny.SAMPLES, [64], [])
    assert files.list_names(f"{store}/out") == ["found.npz", "found.npz.json"]


_exported: dict[str, Any] = {}


def export_of(run: str) -> Any:
    """torchvision's network with the exported weights, as a user builds it."""
    if run not in _exported:
        out = f"{run}_exported"
        assert export.main([run, out, "--format", "safetensors"]) == 0
        names: dict[str, Any] = {}
        written = json.loads(Path(out, "card.json").read_text())
        exec("\n".join(written["build"]), names)
        names["model"].load_state_dict(load_file(f"{out}/encoder.safetensors"))
        _exported[run] = names["model"].eval()
    return _exported[run]


@torch.no_grad()
def forward(network: Any, images: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = network(normalize(images.float() / 255))
    return found


def test_a_folder_equals_the_exported_encoder(
    run: str, tiny_data: DataConfig, tmp_path: Path
) -> None:
    """With the preprocessing of the card, for files of several formats."""
    folder = unpack(tiny_data.val, tmp_path / "images")
    grating = sorted(folder.glob("*/*.png"))
    PillowImage.open(grating[0]).save(f"{folder}/top level.tif")
    PillowImage.open(grating[1]).convert("L").save(f"{folder}/ünï [1].bmp")
    (folder / "notes.txt").write_text("not an image")
    assert features(run, str(folder), f"{tmp_path}/out.npz") == 0
    found = npz(f"{tmp_path}/out.npz")
    names = [str(path.relative_to(folder)) for path in folder.glob("**/*.*") if path.is_file()]
    assert found["names"].tolist() == sorted(set(names) - {"notes.txt"})
    labels = dict(zip(found["names"].tolist(), found["labels"].tolist(), strict=True))
    for name, label in labels.items():
        known = found["classes"][label] if label >= 0 else "."
        assert known == str(Path(name).parent), name
    export_of(run)
    transform = card.transform(f"{run}_exported/card.json")
    with torch.no_grad():
        inputs = torch.stack([transform(folder / name) for name in found["names"].tolist()])
        expected = export_of(run)(inputs).numpy()
    np.testing.assert_allclose(found["features"], expected, rtol=1e-4, atol=1e-5)
    facts = index_of(f"{tmp_path}/out.npz.json")["not_images"]
    assert facts == {".txt files": {"number": 1, "example": "notes.txt"}}


def test_a_folder_in_a_bucket(
    run: str, tiny_data: DataConfig, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that look like patterns mean themselves, and something is told before any access."""
    folder = unpack(tiny_data.val, tmp_path / "images")
    place = f"{store}/a [b] #1"
    for path in folder.glob("*/*.png"):
        name = str(path.relative_to(folder)).replace("a00", "é *?")
        files.write(f"{place}/{name}", path.read_bytes())
    said: list[str] = []

    def open_later(*arguments: Any) -> Any:
        said.append(capture.getvalue())
        return open_encoder(*arguments)

    monkeypatch.setattr("launch.feature_command.open_encoder", open_later)
    capture = io.StringIO()
    monkeypatch.setattr(sys, "stdout", capture)
    assert features(run, place, f"{store}/out.npz") == 0
    assert said == [f"opening {run}\n"]
    assert features(run, str(folder), f"{tmp_path}/local.npz") == 0
    found, expected = npz(f"{store}/out.npz"), npz(f"{tmp_path}/local.npz")
    names = [str(name).replace("é *?", "a00") for name in found["names"]]
    order = np.argsort(names)
    assert [names[i] for i in order] == expected["names"].tolist()
    np.testing.assert_allclose(found["features"][order], expected["features"], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_parts")
def test_formats_hold_the_same(run: str, tiny_data: DataConfig, tmp_path: Path) -> None:
    for suffix in ("npz", "npy", "safetensors"):
        assert features(run, tiny_data.val, f"{tmp_path}/f.{suffix}") == 0
    archive, plain = npz(f"{tmp_path}/f.npz"), np.load(tmp_path / "f.npy")
    tensors = load_file(f"{tmp_path}/f.safetensors")
    assert np.array_equal(archive["features"], plain)
    assert np.array_equal(archive["features"], tensors["features"].numpy())
    assert np.array_equal(archive["labels"], tensors["labels"].numpy())
    for name in ("npy", "safetensors"):
        with open(tmp_path / f"f.{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows] == archive["names"].tolist()
        assert [int(row["id"]) for row in rows] == archive["ids"].tolist()
        classes = [archive["classes"][label] for label in archive["labels"].tolist()]
        assert [row["class"] for row in rows] == classes


def test_parquet(
    run: str, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        import pyarrow.parquet
    except ImportError:
        assert features(run, tiny_data.val, f"{tmp_path}/f.parquet") == 1
        assert "parquet needs `pip install 'byol-engine[parquet]'`" in capsys.readouterr().err
        return
    assert features(run, tiny_data.val, f"{tmp_path}/f.parquet") == 0
    assert features(run, tiny_data.val, f"{tmp_path}/f.npz") == 0
    table, expected = pyarrow.parquet.read_table(f"{tmp_path}/f.parquet"), npz(f"{tmp_path}/f.npz")
    assert np.array_equal(np.stack(table["features"].to_numpy()), expected["features"])
    assert table["name"].to_pylist() == expected["names"].tolist()


def test_layers_maps_and_halves(run: str, tiny_data: DataConfig, tmp_path: Path) -> None:
    """Maps are those of torchvision's extractor, and their mean is what is pooled."""
    from torchvision.models.feature_extraction import create_feature_extractor

    network = export_of(run)
    crops = CropReader(32, 0.875, 1, 0, print).read(indexes.load(tiny_data.val, "data"))
    images = torch.cat([batch.images for batch in crops])
    nodes = {"maxpool": "stem", **{f"layer{i}": f"layer{i}" for i in range(1, 5)}}
    expected: Any = forward(create_feature_extractor(network, nodes), images)
    for layer, maps in expected.items():
        out = f"{tmp_path}/{layer}"
        assert features(run, tiny_data.val, f"{out}.npz", "--layer", layer) == 0
        pooled: Any = maps.mean(dim=(2, 3))
        found = npz(f"{out}.npz")["features"]
        np.testing.assert_allclose(found, pooled.numpy(), rtol=1e-3, atol=1e-4)
    half = ["--maps", "--layer", "layer3", "--dtype", "float16"]
    assert features(run, tiny_data.val, f"{tmp_path}/half.safetensors", *half) == 0
    whole = load((tmp_path / "half.safetensors").read_bytes())["features"]
    assert whole.dtype == torch.float16
    assert whole.shape == expected["layer3"].shape
    torch.testing.assert_close(whole.float(), expected["layer3"], rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("small_parts")
def test_a_folder_of_parts(run: str, tiny_data: DataConfig, store: str) -> None:
    assert features(run, tiny_data.train, f"{store}/parts") == 0
    facts = index_of(f"{store}/parts/features.json")
    names = [entry["name"] for entry in facts["files"]]
    assert names == [f"features-{i:05d}.npz" for i in range(11)]
    assert files.list_names(f"{store}/parts") == sorted([*names, "features.json"])
    parts = [npz(f"{store}/parts/{name}") for name in names]
    assert [len(part["ids"]) for part in parts] == [entry["rows"] for entry in facts["files"]]
    ids = np.concatenate([part["ids"] for part in parts])
    assert ids.tolist() == list(range(tiny.SAMPLES))


@pytest.mark.usefixtures("small_parts")
def test_a_stopped_call_goes_on(
    run: str,
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the parts that are missing, or that are not what their record says."""
    calm, out = f"{tmp_path}/calm.npz", f"{tmp_path}/out.npz"
    assert features(run, tiny_data.train, calm) == 0
    write, written = feature_parts.Parts.write, list[int]()

    def stop(self: Any, number: int, *rest: Any) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, *rest)

    monkeypatch.setattr(feature_parts.Parts, "write", stop)
    assert features(run, tiny_data.train, out) == 130
    assert not Path(out).exists()
    damaged = Path(f"{out}.parts/features-00002.npy")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    written.clear()

    def note(self: Any, number: int, *rest: Any) -> None:
        written.append(number)
        write(self, number, *rest)

    monkeypatch.setattr(feature_parts.Parts, "write", note)
    assert features(run, tiny_data.train, out) == 0
    assert written == [2, *range(4, 11)]
    assert Path(out).read_bytes() == Path(calm).read_bytes()
    assert not Path(f"{out}.parts").exists()


def test_other_features_are_refused(
    run: str, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"{tmp_path}/out.npz"
    assert features(run, tiny_data.val, out) == 0
    before = Path(out).read_bytes()
    capsys.readouterr()
    assert features(run, tiny_data.val, out) == 0
    assert "already there" in capsys.readouterr().out
    Path(f"{tmp_path}/mine.npy.csv").write_text("mine")
    Path(f"{tmp_path}/other.npz.json").write_text("[]")
    for arguments, text in (
        ([run, tiny_data.train, out], "images: there 40, here 104"),
        ([run, tiny_data.val, out, "--layer", "layer2"], "layer: there layer4, here layer2"),
        ([run, tiny_data.val, out, "--checkpoint", "16"], "else (step: there 20, here 16): choose"),
        ([run, tiny_data.val, f"{tmp_path}/mine.npy"], "mine.npy.csv: is there already"),
        ([run, tiny_data.val, f"{tmp_path}/other.npz"], "holds something else (no features)"),
        ([run, tiny_data.val, out, "--format", "npy"], "--format npy differ"),
        ([run, tiny_data.val, ""], "OUT must be the URL"),
        ([run, tiny_data.val, f"{tmp_path}/o.np"], ".np is no format: did you mean .npz? A folder"),
        ([run, tiny_data.val, f"{tmp_path}/o.Parquett"], "did you mean .parquet?"),
        ([run, "", out], "DATA is empty"),
        ([run, f"{tmp_path}/nothing", out], "DATA {tmp}/nothing: no such folder"),
        ([run, run, f"{tmp_path}/x.npz"], "no images there"),
        ([run, f"{tiny_data.val}/index.json", out], "give the folder"),
        ([run, tiny_data.val, out, "--network", "pixels", "--maps"], "has no layers"),
        ([run, tiny_data.val, out, "--layer", "layer5"], "'layer5' is not one of"),
        ([run, tiny_data.val, out, "--data.corrupt", "2"], "--data.corrupt must be"),
    ):
        assert features(*arguments) == 1, arguments
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert text.replace("{tmp}", str(tmp_path)) in line
    assert Path(out).read_bytes() == before


@pytest.mark.parametrize("name", ["out.npy", "out"])
def test_other_features_are_replaced_when_asked(
    name: str,
    run: str,
    tiny_data: DataConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The files are those of a first call, and files of the user's own stay."""
    out, calm = f"{tmp_path}/{name}", f"{tmp_path}/calm/{name}"
    assert features(run, tiny_data.train, out) == 0
    assert features(run, tiny_data.val, calm) == 0
    (tmp_path / "mine.txt").write_text("mine")
    if Path(out).is_dir():  # It is named much as a part is.
        (tmp_path / "out/features-00007.txt").write_text("mine")
    # A call that was killed leaves such a file.
    work = feature_parts.choose_output(out, None).work
    files.write(f"{work}/features-00000.json.{'0' * 12}.partial", b"")
    assert features(run, tiny_data.val, out) == 1
    error = capsys.readouterr().err
    assert f"images_from: there {tiny_data.train}, here {tiny_data.val})" in error
    assert "images: there 104, here 40; images_from" in error
    assert "rows_of_a_part" not in error
    assert features(run, tiny_data.val, out, "--overwrite") == 0
    for path in Path(tmp_path / "calm").rglob("*"):
        if path.is_file():
            assert (
                path.read_bytes() == (tmp_path / path.relative_to(tmp_path / "calm")).read_bytes()
            )
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not Path(out).is_dir() or (tmp_path / "out/features-00007.txt").read_text() == "mine"
    capsys.readouterr()
    assert features(run, tiny_data.val, out, "--overwrite") == 0
    assert "already there" in capsys.readouterr().out


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_nobodys_features_is_never_removed(store: str, *, overwrite: bool) -> None:
    header = feature_files.Header((4,), np.dtype("<f4"), [])
    for number, (out, mine, text) in enumerate(
        (
            ("out.npz", "out.npz/mine", "out.npz: is a folder"),
            ("out.npz", "out.npz.json/mine", "out.npz.json: is a folder"),
            ("out.npy", "out.npy.csv/mine", "out.npy.csv: is a folder"),
            ("out.npy", "out.npy.parts/mine", "parts: has files of something else, such as mine,"),
            ("out", "out/features-00000.npz/mine", "features-00000.npz: is a folder"),
            ("out", "out/.parts/features-1.json", "else, such as features-1.json"),
        )
    ):
        place = f"{store}/{number}"
        files.write(f"{place}/{mine}", b"mine")
        output = feature_parts.choose_output(f"{place}/{out}", None)
        with pytest.raises(InputError, match=re.escape(text)):
            feature_parts.Parts(output, {}, {}, header, 1).claim(overwrite)
        assert files.read(f"{place}/{mine}") == b"mine"


def test_what_cannot_be_decoded_is_listed(
    run: str, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unpack(tiny_data.val, tmp_path / "images")
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.png"))
    bad = names[3::4][:10]
    for name in bad:
        (folder / name).write_bytes(b"GIF8 but no more")
    assert features(run, str(folder), f"{tmp_path}/out") == 0
    facts = index_of(f"{tmp_path}/out/features.json")
    assert [fault["name"] for fault in facts["left_out"]] == bad
    assert {fault["reason"] for fault in facts["left_out"]} == {"a damaged GIF"}
    found = npz(f"{tmp_path}/out/features-00000.npz")
    assert found["names"].tolist() == [name for name in names if name not in bad]
    assert f"{len(bad)} cannot be decoded" in capsys.readouterr().out
    (folder / names[0]).write_bytes(b"")
    assert features(run, str(folder), f"{tmp_path}/more") == 1
    assert "11 samples were left out, more than data.corrupt allows" in capsys.readouterr().err


def test_wide_images_need_a_window(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.linspace(0, 4000, 40 * 40).reshape(40, 40).astype(np.uint16)
    (tmp_path / "images").mkdir()
    PillowImage.fromarray(values).save(tmp_path / "images" / "wide.png")
    assert features(run, f"{tmp_path}/images", f"{tmp_path}/no.npz") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: DATA {tmp_path}/images: 1 of its images")
    assert "such as --data.window 0 4000, or --data.window-percentiles 1 99" in line
    window = ["--data.window", "0", "4000"]
    assert features(run, f"{tmp_path}/images", f"{tmp_path}/yes.npz", *window) == 0
    assert index_of(f"{tmp_path}/yes.npz.json")["settings"]["window"] == [0, 4000]


def test_features_cluster_by_class(run: str, tmp_path: Path) -> None:
    """k-means finds drawn classes far better than chance, so rows and labels belong together."""
    random, classes = np.random.default_rng(0), 4
    colors = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [230, 230, 230]], np.uint8)
    for number in range(60):
        image = colors[number % classes] + random.integers(0, 25, (36, 40, 3), np.uint8)
        place = tmp_path / "images" / f"class {number % classes}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        PillowImage.fromarray(image).save(place)
    assert features(run, f"{tmp_path}/images", f"{tmp_path}/out.npz", "--layer", "layer1") == 0
    found = npz(f"{tmp_path}/out.npz")
    x = found["features"] - found["features"].mean(0)
    purity = []
    for _ in range(5):
        centers = x[random.choice(len(x), classes, replace=False)]
        for _ in range(20):
            which = ((x[:, None] - centers) ** 2).sum(2).argmin(1)
            some = [x[which == c] for c in range(classes)]
            centers = np.stack([r.mean(0) if len(r) else x[0] for r in some])
        purity.append(agreement(which, found["labels"]))
    chance = [agreement(which, random.permutation(found["labels"])) for _ in range(50)]
    assert max(purity) > max(chance) + 0.2


def agreement(which: NDArray[Any], labels: NDArray[Any]) -> float:
    """The fraction of rows whose label is the most frequent one of their cluster."""
    groups = [labels[which == c] for c in np.unique(which)]
    return float(sum(np.bincount(group).max() for group in groups) / len(labels))


def test_two_processes_write_the_same(run: str, tiny_data: DataConfig, tmp_path: Path) -> None:
    """torchrun, and a folder of images that has more than one part."""
    folder = unpack(tiny_data.train, tmp_path / "images")
    whole = tmp_path / "whole"
    for i in range(3):
        shutil.copytree(folder, whole / f"copy{i}")
    folder = whole
    assert features(run, str(folder), f"{tmp_path}/one.npz") == 0
    script = ["-m", "torch.distributed.run", "--nproc-per-node=2", str(Path(evaluate.__file__))]
    subprocess.run(
        [sys.executable, *script, "features", run, str(folder), f"{tmp_path}/two.npz"],
        check=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert Path(f"{tmp_path}/one.npz").read_bytes() == Path(f"{tmp_path}/two.npz").read_bytes()
