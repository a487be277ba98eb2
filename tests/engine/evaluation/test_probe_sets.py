"""Runs on unlabeled images: what is measured on sets of one's own, and what without any labels."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.debug import debug_step
from engine.evaluation import during_training
from engine.evaluation.during_training import ProbeConfig
from engine.log.figures import effective_rank
from engine.processes.launcher import rank
from engine.processes.parallel import ParallelConfig
from engine.recipe import Recipe
from launch import evaluate
from shards.errors import InputError
from shards.loader import DataConfig
from shards.making import synthetic
from shards.png import encode_png
from shards.storage import files
from tests.helpers import tiny
from tests.helpers.labels import draw_some
from tests.helpers.ranks import Ranks
from tests.helpers.training import open_trainer, train

NAMES = ("stripes", "checks")  # of the classes, the first two that are drawn


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("unlabeled") / "train"
    assert not draw_some(folder, tiny.SAMPLES, lambda _: False).classes
    return DataConfig(train=str(folder), streams=4)


def write_folder(url: str, number: int, classes: tuple[str, ...] = NAMES, seed: int = 1) -> str:
    """A plain folder of images, with one folder for each class."""
    images, _ = synthetic.draw(seed, np.arange(8 * number), 32)
    for i in range(number * len(classes)):
        label, image = i % len(classes), images[8 * (i // len(classes)) + i % len(classes)]
        name = f"{i}.png"
        files.write(files.join(url, classes[label], name), encode_png(image[..., 0]))
    return url


def recipe(data: DataConfig, run: str, probe: ProbeConfig, **changes: Any) -> Recipe:
    given = dataclasses.replace(probe, every=4, neighbours=3)
    return tiny.recipe(data, run, probe=given, **({"steps": 4} | changes))


def last(run: str) -> dict[str, Any]:
    lines = files.read(files.join(run, "metrics.jsonl")).splitlines()
    record: dict[str, Any] = json.loads(lines[-1])
    return record


def test_equal_sets_are_told(
    unlabeled: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each image would find itself. Folders of other images are not taken for equal ones."""
    a, b = write_folder(f"{tmp_path}/a", 4), write_folder(f"{tmp_path}/b", 4, seed=2)
    for name, val, told in (("same", a, 1), ("other", b, 0)):
        probe = ProbeConfig(train=a, val=val)
        train(recipe(unlabeled, f"{tmp_path}/{name}", probe))
        said = capsys.readouterr().out
        assert said.count("probe.train and probe.val are the same images, so each one") == told


def test_without_any_labels_the_features_are_measured(
    unlabeled: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(unlabeled, str(tmp_path), ProbeConfig(baseline=True)))
    record, output = last(str(tmp_path)), capsys.readouterr().out
    assert record["feature_rank"] > 1
    assert record["feature_std"] > 0
    assert not {"knn_top1", "online_top1", "head_loss", "evaluation_failed"} & record.keys()
    (line,) = [line for line in output.splitlines() if "measure no kNN" in line]
    assert "because data.val is not set: give --probe.train URL" in line
    assert any(b"views" in path.read_bytes() for path in tmp_path.glob("**/events.out.*"))


def test_only_what_is_missing_is_asked_for(
    unlabeled: DataConfig, tiny_data: DataConfig, tmp_path: Path
) -> None:
    folder = write_folder(f"{tmp_path}/a", 20)
    alone = dataclasses.replace(tiny_data, val="")
    for number, (data, probe, words) in enumerate(
        (
            (unlabeled, ProbeConfig(train=folder), "data.val is not set: give --probe.val URL, w"),
            (unlabeled, ProbeConfig(val=folder), "data.train has no labels: give --probe.train UR"),
            (alone, ProbeConfig(), "data.val is not set: give --probe.val URL, which has labels"),
        )
    ):
        trainer = open_trainer(recipe(data, f"{tmp_path}/{number}", probe))
        assert trainer.probe is not None
        (note,) = trainer.probe.sets.notes
        assert words in note


def test_one_unlabeled_set_of_two(
    unlabeled: DataConfig, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataclasses.replace(tiny_data, val=unlabeled.train)
    train(recipe(data, str(tmp_path), ProbeConfig()))
    assert "no kNN, because data.val has no labels" in capsys.readouterr().out
    record = last(str(tmp_path))
    assert "knn_top1" not in record
    assert record["feature_rank"] > 1
    assert record["head_loss"] > 0


def test_folders_are_packed_once(
    unlabeled: DataConfig, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = files.join(store, "run")
    probe = ProbeConfig(
        train=write_folder(files.join(store, "a"), 20),
        val=write_folder(files.join(store, "b"), 10, seed=2),
    )
    train(recipe(unlabeled, run, probe))
    assert capsys.readouterr().out.count("for evaluations") == 2
    record = last(run)
    assert 0 <= record["knn_top1"] <= 1
    assert "online_top1" not in record
    kept = {name: files.list_names(files.join(run, "probe", name)) for name in ("train", "val")}
    train(recipe(unlabeled, run, probe, steps=5))
    assert "for evaluations" not in capsys.readouterr().out

    write_folder(files.join(store, "a"), 21)
    train(recipe(unlabeled, run, probe, steps=6))
    assert capsys.readouterr().out.count("for evaluations") == 1
    (changed,) = files.list_names(files.join(run, "probe", "train"))
    assert [changed] != kept["train"]
    assert files.list_names(files.join(run, "probe", "val")) == kept["val"]


def test_evaluations_take_the_sets_of_the_run(
    unlabeled: DataConfig, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A packed folder, also when it is gone, and shards, where data.val has no labels."""
    folder, run = write_folder(f"{tmp_path}/a", 20), f"{tmp_path}/run"
    knn = ["knn", run, "--k", "3", "--threads", "1"]
    train(recipe(unlabeled, run, ProbeConfig(train=folder, val=folder)))
    shutil.rmtree(folder)
    assert evaluate.main(knn) == 0
    output = capsys.readouterr().out
    for name in ("train", "val"):
        assert f"data.{name} is the run's probe.{name}: {run}/probe/{name}/" in output
    assert "knn_top1" in files.read(files.join(run, "metrics.jsonl")).decode()
    shutil.rmtree(f"{run}/probe")
    assert evaluate.main(knn) == 1
    assert "there are no shards at its probe.train" in capsys.readouterr().err

    shutil.rmtree(run)
    data = dataclasses.replace(unlabeled, val=unlabeled.train)
    train(recipe(data, run, ProbeConfig(train=tiny_data.train, val=tiny_data.val)))
    assert evaluate.main(knn) == 0
    assert f"data.val is the run's probe.val: {tiny_data.val}" in capsys.readouterr().out


def measured(config: Recipe) -> None:
    train(config)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_measure_what_one_does(
    ranks: Ranks, unlabeled: DataConfig, tmp_path: Path, strategy: Any
) -> None:
    probe = ProbeConfig(
        train=write_folder(f"{tmp_path}/a", 20), val=write_folder(f"{tmp_path}/b", 10, seed=2)
    )
    found = []
    for name, size in (("one", 1), ("two", 2)):
        config = recipe(unlabeled, f"{tmp_path}/{name}", probe, precision="fp64")
        config = dataclasses.replace(config, parallel=ParallelConfig(strategy, timeout=60))
        ranks.run(measured, config, size=size)
        found.append(last(f"{tmp_path}/{name}"))
    assert found[0]["knn_top1"] == found[1]["knn_top1"]
    assert found[0]["feature_rank"] == pytest.approx(found[1]["feature_rank"], rel=1e-6)


def measure_where_the_library_rounds_otherwise(config: Recipe) -> float:
    with pytest.MonkeyPatch.context() as patch:
        other = lambda features: effective_rank(features) * (1 + 1e-12 * rank())  # noqa: E731
        patch.setattr(during_training, "effective_rank", other)
        probe = open_trainer(config).probe
        assert probe is not None
        return float(probe.evaluate()["feature_rank"])


def test_processes_agree_on_the_rank(ranks: Ranks, tiny_data: DataConfig, tmp_path: Path) -> None:
    """It may choose the checkpoint to save, which they do together."""
    config = recipe(tiny_data, f"{tmp_path}/run", ProbeConfig())
    config = dataclasses.replace(config, parallel=ParallelConfig("ddp", timeout=60))
    found = ranks.run(measure_where_the_library_rounds_otherwise, config, size=2)
    assert found[0] == found[1] > 1


def test_other_classes_than_the_head_learns(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = ProbeConfig(
        train=write_folder(f"{tmp_path}/a", 20), val=write_folder(f"{tmp_path}/b", 10, seed=2)
    )
    train(recipe(tiny_data, f"{tmp_path}/run", probe))
    assert "probe.val has other classes than data.train: no online_top1" in capsys.readouterr().out
    record = last(f"{tmp_path}/run")
    assert "knn_top1" in record
    assert "online_top1" not in record
    assert record["head_loss"] > 0


def splits(folder: Path) -> ProbeConfig:
    for name in ("train", "val"):
        write_folder(f"{folder}/a/{name}", 4)
    return ProbeConfig(train=f"{folder}/a")


def no_folder(folder: Path) -> ProbeConfig:
    return ProbeConfig(val=f"{folder}/nothing")


def flat(folder: Path) -> ProbeConfig:
    write_folder(f"{folder}/a/x", 4)
    return ProbeConfig(train=f"{folder}/a/x/{NAMES[0]}")


def no_images(folder: Path) -> ProbeConfig:
    (folder / "a").mkdir()
    (folder / "a" / "x.txt").write_text("x")
    return ProbeConfig(train=f"{folder}/a")


def only_links(folder: Path) -> ProbeConfig:
    elsewhere = write_folder(f"{folder}/elsewhere", 4)
    (folder / "a" / "x").mkdir(parents=True)
    (folder / "a" / "x" / "0.png").symlink_to(f"{elsewhere}/{NAMES[0]}/0.png")
    return ProbeConfig(train=f"{folder}/a")


def other_classes(folder: Path) -> ProbeConfig:
    return ProbeConfig(
        train=write_folder(f"{folder}/a", 4), val=write_folder(f"{folder}/b", 4, ("x", "checks"))
    )


def no_labels(folder: Path) -> ProbeConfig:
    draw_some(folder / "a", 20, lambda _: False)
    return ProbeConfig(val=f"{folder}/a")


def one_folder_too_high(folder: Path) -> ProbeConfig:
    draw_some(folder / "a" / "train", 20, lambda _: True)
    return ProbeConfig(train=f"{folder}/a")


def deep_pixels(folder: Path) -> ProbeConfig:
    probe = ProbeConfig(train=write_folder(f"{folder}/a", 4))
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(deep).save(folder / "a" / NAMES[0] / "deep.png")
    return probe


FAULTS = {
    splits: "probe.train {}/a: holds the splits train and val: give the folder of one",
    no_folder: "probe.val {}/nothing: no such folder",
    flat: "probe.train {}/a/x/stripes: its images have no labels",
    no_images: "probe.train {}/a: no images there: .txt files (1)",
    only_links: "probe.train {}/a: no images there: links to files outside of the folder, which "
    "`python launch/pack.py --follow-links` takes (1); give shards of",
    other_classes: "probe.val has other classes than probe.train (2 and 2, stripes is a class of "
    "one only)",
    no_labels: "probe.val {}/a: has no labels: give a set that has",
    one_folder_too_high: "probe.train {0}/a: no index.json there; there is one in {0}/a/train",
    deep_pixels: "probe.train {}/a: 1 of its images, such as stripes/deep.png, have more than 8",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_one_line(fault: Any, unlabeled: DataConfig, tmp_path: Path) -> None:
    probe = fault(tmp_path)
    with pytest.raises(InputError) as caught:
        train(recipe(unlabeled, f"{tmp_path}/run", probe))
    assert str(caught.value).startswith(FAULTS[fault].format(tmp_path))
    assert not Path(f"{tmp_path}/run/checkpoints").exists()


def test_classes_of_the_set_that_is_not_given(tiny_data: DataConfig, tmp_path: Path) -> None:
    probe = ProbeConfig(val=write_folder(f"{tmp_path}/b", 4))
    with pytest.raises(InputError, match=r"^probe.val has other .* or give --probe.train URL too$"):
        train(recipe(tiny_data, f"{tmp_path}/run", probe))


def test_a_debug_step_leaves_nothing(unlabeled: DataConfig, tmp_path: Path) -> None:
    probe = ProbeConfig(
        train=write_folder(f"{tmp_path}/a", 20), val=write_folder(f"{tmp_path}/b", 10, seed=2)
    )
    debug_step(open_trainer(recipe(unlabeled, f"{tmp_path}/run", probe, debug_step=True)))
    assert [path for path in (tmp_path / "run").glob("**/*") if path.is_file()] == []


def open_elsewhere(config: Recipe, places: list[str]) -> str:
    """On a rank: what is said when probe.val is at another place on each machine."""
    probe = dataclasses.replace(config.probe, val=places[rank()])
    try:
        return open_trainer(dataclasses.replace(config, probe=probe)).probe.val.url  # type: ignore[union-attr]
    except InputError as error:
        return str(error)


def test_machines_have_the_same_set_in_other_places(
    ranks: Ranks, tiny_data: DataConfig, unlabeled: DataConfig, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_data.val, tmp_path / "val")
    config = recipe(tiny_data, f"{tmp_path}/run", ProbeConfig())
    places = [tiny_data.val, str(other)]
    assert ranks.run(open_elsewhere, config, places, size=2) == places
    said = ranks.run(open_elsewhere, config, [tiny_data.val, tiny_data.train], size=2)
    assert all("digest of probe.val: there" in text for text in said), said
    said = ranks.run(open_elsewhere, config, [tiny_data.val, unlabeled.train], size=2)
    assert all("has no labels" in text for text in said), said
