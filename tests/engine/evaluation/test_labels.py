"""Labels that an evaluation needs are looked for before it learns anything."""

import json
from pathlib import Path

import numpy as np
import pytest

from engine.evaluation import finetune, linear, results, supervised
from engine.evaluation.session import EvaluationDataConfig
from engine.evaluation.supervised import hold_out
from launch import evaluate
from shards.errors import InputError
from shards.loader import DataConfig
from shards.making import pack
from tests.conftest import draw_photo
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import train

SAMPLES, HOLDOUT, CLASSES = 60, 3, ["ant", "bee"]


@pytest.fixture(scope="module")
def run(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("labels") / "run")
    train(tiny.recipe(tiny_data, url, steps=1, probe=tiny.NO_PROBE))
    return url


def write(url: Path, labels: list[int], damaged: bool = False) -> str:
    """Images with these labels, by their sample ids; -1: none. `damaged`: labeled ones."""

    def read(image: pack.Image) -> bytes:
        content = draw_photo(int(image.path[:-4]), 40, 40)
        return b"?" * len(content) if damaged and image.label >= 0 else content

    images = [
        pack.Image(f"{i}.jpg", len(draw_photo(i, 40, 40)), label) for i, label in enumerate(labels)
    ]
    plan = pack.Plan(images, [0, len(images) // 2, len(images)], CLASSES)
    pack.write_shards(plan, str(url), read, threads=1)
    return str(url)


def labels_of(held: bool, others: bool) -> list[int]:
    """Which of the training images have a label: those held out, and the others."""
    ids = np.arange(SAMPLES)
    which = hold_out(SAMPLES, HOLDOUT, 0)(ids)
    assert 0 < which.sum() < SAMPLES
    return [
        int(i) % 2 if (held if out else others) else -1 for i, out in zip(ids, which, strict=True)
    ]


PROTOCOLS = [["linear"], ["linear", "--fast"], ["finetune"]]
FEW = [
    *("--lr", "0.1", "--epochs", "1", "--batch", "16", "--threads", "1"),
    *("--holdout", str(HOLDOUT), "--data.corrupt", "1"),
]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=" ".join)
@pytest.mark.parametrize(
    ("train", "val", "damaged", "text"),
    [
        ((True, False), True, False, "no image of data.train that is not held out has a label"),
        ((False, True), True, False, "no image held out of data.train has a label"),
        ((True, True), False, False, "no image of data.val has a label and can be decoded"),
        ((True, True), True, True, "no image of data.val has a label and can be decoded"),
    ],
    ids=["learned from", "held out", "validation", "validation that is damaged"],
)
def test_missing_labels_are_found_before_anything_is_learned(
    protocol: list[str],
    train: tuple[bool, bool],
    val: bool,
    damaged: bool,
    text: str,
    run: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned = write(tmp_path / "train", labels_of(*train))
    measured = write(tmp_path / "val", [0, 1] * 8 if val else [-1] * 16, damaged)
    for module in (supervised, linear, finetune):
        monkeypatch.setattr(module, "train", lambda *_: pytest.fail("it began to learn"))
    data = ["--data.train", learned, "--data.val", measured, "--out", str(tmp_path / "out")]
    assert evaluate.main([protocol[0], run, *protocol[1:], *data, *FEW]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {text}")


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=" ".join)
def test_a_partly_labeled_set_is_learned_from(
    protocol: list[str], run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ALWAYS_HIT", 1)  # so that the top five of two classes are shown
    learned = write(tmp_path / "train", [-1] * 10 + labels_of(held=True, others=True)[10:])
    measured = write(tmp_path / "val", [0, -1, 1, -1] * 4)
    data = ["--data.train", learned, "--data.val", measured, "--out", str(tmp_path / "out")]
    assert evaluate.main([protocol[0], run, *protocol[1:], *data, *FEW]) == 0
    (found,) = (tmp_path / "out").glob("**/result.json")
    table = json.loads(found.read_text())["table"]
    # The top five of two classes hold every label, so any other value counts images without one.
    assert [row["top-5"] for row in table if row["top-5"] != ""] == [1.0]


@pytest.mark.parametrize("protocol", [["knn"], *PROTOCOLS], ids=" ".join)
def test_what_tells_nothing_is_left_out(
    protocol: list[str], run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The top five of two classes are always right, and no more images vote than there are."""
    learned, measured = write(tmp_path / "train", [0, 1] * 30), write(tmp_path / "val", [0, 1] * 8)
    data = ["--data.train", learned, "--data.val", measured, "--out", str(tmp_path / "out")]
    more = ["--k", "5", "200", "500", "--threads", "1"] if protocol == ["knn"] else FEW
    assert evaluate.main([protocol[0], run, *protocol[1:], *data, *more]) == 0
    (path,) = (tmp_path / "out").glob("**/result.json")
    found = json.loads(path.read_text())
    assert all("top-1" in row and "top-5" not in row for row in found["table"])
    assert not [name for name in found["metrics"] if "top5" in name]
    limited = "--k 200 500: limited to 60, which are all images of data.train with a label\n"
    assert (limited in capsys.readouterr().out) == (protocol == ["knn"])


def test_few_labels_are_measured_only_where_there_are_some(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = write(tmp_path / "train", [0, 1] * 15)
    measured = write(tmp_path / "val", [-1] * 16)
    monkeypatch.setattr(finetune, "train", lambda *_: pytest.fail("it began to learn"))
    data = ["--data.train", learned, "--data.val", measured, "--out", str(tmp_path / "out")]
    half = ["semi-supervised", run, "--fraction", "0.6", *data, *FEW]
    assert evaluate.main(half) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no image of data.val has a label")


def check(run: str, data: str, out: str) -> str:
    """On a rank: what the check says of a set."""
    sets = EvaluationDataConfig(data, data)
    evaluation = evaluate.Options(run, sets, out=out, threads=1).open("knn", {})
    try:
        evaluation.check_labels(evaluation.val, "of data.val", "measured on it")
    except InputError as error:
        return str(error)
    return ""


def test_one_labeled_image_on_any_process_is_enough(ranks: Ranks, run: str, tmp_path: Path) -> None:
    for name, labels in (("none", [-1] * 16), ("one", [-1] * 15 + [1]), ("all", [1] * 16)):
        data = write(tmp_path / name, labels)
        found = ranks.run(check, run, data, str(tmp_path / "out"), size=2)
        assert [bool(text) for text in found] == [name == "none"] * 2
