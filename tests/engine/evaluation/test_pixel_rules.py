"""The rules by which files become pixels are the run's, in evaluations and in the card."""

import dataclasses
import json
from pathlib import Path

import pytest

from launch import evaluate, export
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.training import train

QUICK = ["--threads", "1", "--epochs", "0.5", "--batch", "16", "--lr", "0.1"]


@pytest.fixture(scope="module")
def run(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("rules") / "run")
    data = dataclasses.replace(tiny_data, max_pixels=1024, exif="apply")
    assert train(tiny.recipe(data, url, steps=1, probe=tiny.NO_PROBE))
    return url


def inputs(folder: Path) -> list[tuple[str, int]]:
    documents = [json.loads(path.read_text())["input"] for path in folder.glob("**/result.json")]
    return sorted((document["exif"], document["max_pixels"]) for document in documents)


def test_an_evaluation_follows_the_run(run: str, tmp_path: Path) -> None:
    knn = ["knn", run, "--k", "5", "--threads", "1", "--out", str(tmp_path)]
    assert evaluate.main(knn) == 0
    assert inputs(tmp_path) == [("apply", 1024)]
    assert evaluate.main([*knn, "--exif", "ignore"]) == 0
    assert evaluate.main([*knn, "--data.max-pixels", "5000"]) == 0
    assert inputs(tmp_path) == [("apply", 1024), ("apply", 5000), ("ignore", 1024)]


@pytest.mark.parametrize(
    "protocol", [["knn", "--k", "5"], ["linear", *QUICK], ["finetune", *QUICK]]
)
def test_every_protocol_has_the_limit(
    run: str, tmp_path: Path, protocol: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = protocol
    limit = ["--data.max-pixels", "1023", "--out", str(tmp_path)]
    assert evaluate.main([name, run, *options, *limit]) == 1
    assert "32 x 32 pixels, more than data.max_pixels (1,023)" in capsys.readouterr().err


def test_the_card_names_the_orientation(run: str, tmp_path: Path) -> None:
    for options, rule in (([], "apply"), (["--exif", "ignore"], "ignore")):
        out = tmp_path / rule
        assert export.main([run, str(out), "--format", "safetensors", *options]) == 0
        assert json.loads((out / "card.json").read_text())["input"]["exif_orientation"] == rule
