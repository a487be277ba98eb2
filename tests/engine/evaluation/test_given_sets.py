"""Evaluations on plain folders of images, which are packed beside the results."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from engine.evaluation.given_sets import GivenSet
from engine.processes.world import join, set_timeout
from launch import evaluate
from shards.loader import DataConfig
from shards.making import pack
from shards.making.convert import PixelOptions
from shards.making.packed_folder import Folder
from shards.storage import files
from tests.engine.evaluation.test_probe_sets import NAMES, write_folder
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.tars import write_tar
from tests.helpers.training import train
from tests.launch.test_evaluate import result

FEW = ["--threads", "1"]


@pytest.fixture(scope="module")
def run(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("given") / "run")
    assert train(tiny.recipe(tiny_data, url, steps=1, probe=tiny.NO_PROBE))
    return url


def test_folders_are_packed_beside_the_results(
    run: str, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are packed once, and by an evaluation that names them the other way round not again."""
    a, b = write_folder(files.join(s3, "a"), 12), write_folder(files.join(s3, "b"), 8, seed=2)
    out = str(tmp_path)
    knn = ["knn", run, "--k", "3", *FEW, "--out", out]
    assert evaluate.main([*knn, "--data.train", a, "--data.val", b]) == 0
    output = capsys.readouterr().out
    assert f"packing 24 images of {a} for evaluations" in output
    assert f"data.train is packed, and stays: {out}/packed/" in output
    assert "data.val is packed, and stays" in output
    (name,) = [name for name in result(out, "knn")["metrics"] if name.startswith("knn_k3_t0.07")]
    assert "_top1_on_" in name  # these are not the run's own images
    assert evaluate.main([*knn, "--data.train", b, "--data.val", a]) == 0
    assert "for evaluations" not in capsys.readouterr().out
    sheet = ["neighbours", run, *FEW, "--out", out, "--data.train", f"{a}/{NAMES[0]}"]
    assert evaluate.main([*sheet, "--data.val", b]) == 0  # it needs no labels


def test_what_learns_takes_folders(run: str, tmp_path: Path) -> None:
    a, b = write_folder(f"{tmp_path}/a", 12), write_folder(f"{tmp_path}/b", 8, seed=2)
    given = ["--data.train", a, "--data.val", b, *FEW, "--batch", "8", "--epochs", "1"]
    for protocol, more in (
        ("linear", ["--lr", "0.1"]),
        ("finetune", ["--lr", "0.1"]),
        ("semi-supervised", ["--fraction", "0.5", "--lr", "0.1"]),
    ):
        call = [protocol, run, *given, *more, "--out", f"{tmp_path}/out"]
        assert evaluate.main(call) == 0, protocol
        result(f"{tmp_path}/out", protocol)


def test_all_places_are_checked_before_anything_is_packed(
    run: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(pack, "write_shards")  # packing would fail
    a = write_folder(f"{tmp_path}/a", 4)
    other = write_folder(f"{tmp_path}/other", 4, ("x", "checks"))
    lone = str(shutil.copytree(run, tmp_path / "lone"))
    recipe = Path(lone, "recipe.json")
    recipe.write_text(recipe.read_text().replace("/val", "/gone"))
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", {"0.png": b"x"})
    for call, expected in (
        ((run, "--data.val", f"{tmp_path}/none"), "data.val {}/none: no such folder"),
        ((run, "--data.val", other), "data.val has other classes than data.train"),
        ((lone,), "/gone: no index.json there"),
        ((run, "--data.val", f"{tmp_path}/tars"), "pack.py --index-only {}/tars"),
    ):
        assert evaluate.main(["knn", *call, "--data.train", a, *FEW]) == 1
        assert expected.format(tmp_path) in capsys.readouterr().err


def open_slowly(url: str, cache: str) -> str:
    world = join(1, distributed=True)
    given = GivenSet(url, "data.val", world)
    pack_folder = Folder.keep_packed

    def pack_slowly(*arguments: Any, **options: Any) -> str:
        time.sleep(3)
        return pack_folder(*arguments, **options)

    set_timeout(1.0, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "keep_packed", pack_slowly)
        options = {"threads": 1, "report": print, "alone": True}
        return given.open(cache, PixelOptions, **options).digest  # type: ignore[arg-type]


def test_processes_wait_for_one_that_packs(ranks: Ranks, tmp_path: Path) -> None:
    """A large folder takes longer than they wait for each other at the start."""
    url = write_folder(f"{tmp_path}/a", 4)
    one, other = ranks.run(open_slowly, url, f"{tmp_path}/packed", size=2)
    assert one == other
