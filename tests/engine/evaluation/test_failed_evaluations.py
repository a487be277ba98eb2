"""Evaluations whose data is gone: all processes agree, the log says so, and training goes on."""

import dataclasses
import gc
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.log.journal import FAILED
from engine.log.metrics import TIMINGS
from engine.processes.launcher import rank
from engine.processes.parallel import ParallelConfig
from engine.recipe import Recipe
from shards import index as indexes
from shards.errors import InputError
from shards.loader import DataConfig
from shards.making import synthetic
from shards.storage import files
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, open_trainer, train, training


@pytest.fixture
def data(tiny_data: DataConfig, tmp_path: Path) -> DataConfig:
    """The training set that all tests share, and a validation set of this test's own."""
    shutil.copytree(tiny_data.val, tmp_path / "val")
    return dataclasses.replace(tiny_data, val=str(tmp_path / "val"))


def remove_shards(val: str) -> None:
    for shard in Path(val).glob("*.tar"):
        shard.unlink()


def truncate_shards(val: str) -> None:
    for shard in Path(val).glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:700])


def overwrite_shards(val: str) -> None:
    for shard in Path(val).glob("*.tar"):
        shard.write_bytes(b"?" * shard.stat().st_size)


def remove_all(val: str) -> None:
    shutil.rmtree(val)


FAULTS: dict[Callable[[str], None], str] = {
    remove_shards: "the shard is missing",
    truncate_shards: "the shard is truncated",
    overwrite_shards: "not the tar that the index describes",
    remove_all: "the shard is missing",
}


def train_and_harm(
    recipe: Recipe, harm: Callable[[str], None], restore: str = "", on: int | None = None
) -> int:
    """Train, and harm data.val after step 7; before step 13 it is `restore` again.

    With `on`, only the reads of this rank find the harm.
    """
    with training(recipe) as trainer:
        probe, train_step = trainer.probe, trainer.train_step
        assert probe is not None
        if on not in (None, rank()):
            harm = lambda _: None  # noqa: E731
        elif on is not None:
            own = shutil.copytree(recipe.data.val, f"{recipe.data.val}-{on}")
            probe.val = indexes.load(own, "data.val")

        def step(batch: Any) -> Any:
            if trainer.step == 7:
                harm(probe.val.url)
            if trainer.step == 13 and restore:
                shutil.copytree(restore, probe.val.url, dirs_exist_ok=True)
            return train_step(batch)

        trainer.train_step = step  # type: ignore[method-assign]
        finish(trainer)
        return probe.failures


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_measures(record: dict[str, Any]) -> dict[str, Any]:
    left_out = {"knn_top1", "knn_images", "online_top1", "feature_rank", *TIMINGS, FAILED}
    return {name: value for name, value in record.items() if name not in left_out}


@pytest.mark.parametrize("harm", FAULTS, ids=lambda f: f.__name__)
def test_training_goes_on_and_the_log_says_what_is_missing(
    harm: Callable[[str], None],
    data: DataConfig,
    tiny_data: DataConfig,
    whole_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train_and_harm(tiny.recipe(data, tmp_path / "run"), harm, restore=tiny_data.val) == 1
    found, output = records(tmp_path / "run"), capsys.readouterr().out
    assert [record["step"] for record in found] == list(range(1, 21))
    assert [r["step"] for r in found if "knn_top1" in r] == [5, 15, 20]
    (failed,) = [record for record in found if FAILED in record]
    assert failed["step"] == 10
    assert FAULTS[harm] in failed[FAILED]
    (line,) = [line for line in output.splitlines() if "an evaluation failed" in line]
    assert FAULTS[harm] in line
    assert "1 evaluation failed" in output

    twin = records(whole_run)
    assert list(map(without_measures, found)) == list(map(without_measures, twin))
    assert found[-1]["knn_top1"] == twin[-1]["knn_top1"]


def test_each_kind_is_reported_once(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_and_harm(tiny.recipe(data, tmp_path / "run"), remove_shards) == 3
    assert capsys.readouterr().out.count("an evaluation failed") == 1
    assert [r["step"] for r in records(tmp_path / "run") if FAILED in r] == [10, 15, 20]


def test_no_threads_are_left(data: DataConfig, tmp_path: Path) -> None:
    trainer = open_trainer(tiny.recipe(data, tmp_path / "run"))
    before = threading.active_count()
    remove_shards(data.val)
    for _ in range(2):
        assert trainer.probe is not None
        assert FAILED in trainer.probe.attempt(trainer.step)
    gc.collect()
    assert threading.active_count() == before


def test_features_that_are_not_finite_without_labels(tiny_data: DataConfig, tmp_path: Path) -> None:
    """No kNN looks at them before their rank is measured."""
    probe = open_trainer(
        tiny.recipe(dataclasses.replace(tiny_data, val=""), tmp_path / "run")
    ).probe
    assert probe is not None
    assert probe.evaluate().keys() == {"feature_rank"}
    probe.online.encoder.get_buffer("bn1.running_var").fill_(torch.nan)
    assert probe.attempt(1)[FAILED].startswith("features are not finite")


def check_where_the_set_lies(recipe: Recipe) -> list[int]:
    """On a rank: look at data.val, which the second machine has in an object store."""
    trainer = open_trainer(recipe)
    assert trainer.probe is not None
    if trainer.world.rank == 1:
        trainer.probe.val = synthetic.write("memory://elsewhere/val", 40, 32, seed=1)
    trainer.probe.check_val()
    return trainer.world.all_gather_object(rank())


def test_a_set_may_lie_elsewhere_on_another_machine(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path, parallel=ParallelConfig("ddp", timeout=60))
    assert ranks.run(check_where_the_set_lies, recipe, size=2) == [[0, 1], [0, 1]]


@pytest.mark.parametrize(("strategy", "on"), [("fsdp", 0), ("fsdp", 1), ("ddp", 1)])
def test_all_processes_agree_when_one_cannot_read(
    ranks: Ranks,
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: Any,
    on: int,
) -> None:
    """Several blocks, so that each process has some, and one process alone misses its own."""
    monkeypatch.setattr(indexes, "BLOCK_BYTES", 12_000)
    synthetic.write(f"{tmp_path}/val", 40, 32, seed=1)
    assert len(indexes.load(f"{tmp_path}/val", "data.val").blocks(0)) > 1
    data = dataclasses.replace(tiny_data, val=f"{tmp_path}/val")
    recipe = tiny.recipe(
        data, tmp_path / "run", steps=15, parallel=ParallelConfig(strategy, timeout=60)
    )
    assert ranks.run(train_and_harm, recipe, remove_shards, "", on, size=2) == [2, 2]
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == list(range(1, 16))
    assert [record["step"] for record in found if FAILED in record] == [10, 15]


def test_a_later_start_measures_what_failed(
    data: DataConfig, tiny_data: DataConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_and_harm(tiny.recipe(data, run, steps=10), remove_shards)
    assert FAILED in records(run)[-1]
    shutil.copytree(tiny_data.val, data.val, dirs_exist_ok=True)
    train(tiny.recipe(data, run, steps=12))
    record = records(run)[9]
    assert record["knn_top1"] > 0
    assert record[FAILED] is None


@pytest.mark.parametrize("harm", [remove_shards, truncate_shards, remove_all])
def test_a_start_is_refused(harm: Callable[[str], None], data: DataConfig, tmp_path: Path) -> None:
    harm(data.val)
    with pytest.raises(InputError, match=r"^data.val .*(missing|truncated|no index)"):
        train(tiny.recipe(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["is missing", "is truncated"])
def test_a_start_from_a_store_is_refused(
    store: str, tiny_data: DataConfig, tmp_path: Path, fault: str
) -> None:
    synthetic.write(f"{store}/val", 40, 32, seed=1)
    name = indexes.load(f"{store}/val", "data.val").shards[0].name
    url = f"{store}/val/{name}"
    content = files.read(url)
    files.remove(url)
    if fault == "is truncated":
        files.write(url, content[:-1])
    data = dataclasses.replace(tiny_data, val=f"{store}/val")
    with pytest.raises(InputError, match=f"^data.val {store}/val: shard {name} {fault}"):
        train(tiny.recipe(data, tmp_path / "run"))
