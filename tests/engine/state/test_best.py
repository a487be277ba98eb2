"""The checkpoint that an evaluation ranks best stays, and is found again."""

from pathlib import Path
from typing import Any

import pytest

from engine.encoder.source import EncoderConfig, open_encoder
from engine.evaluation.during_training import Probe, ProbeConfig
from engine.log import journal
from engine.processes.world import join
from engine.recipe import Recipe
from engine.state import checkpoint
from engine.state.best import Best, find_best
from engine.state.checkpoint import CheckpointConfig
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, train, training

VALUES = {5: 0.2, 10: 0.9, 15: 0.5, 20: 0.9}  # of knn_top1, by step


def recipe(data: DataConfig, run: str, key: str = "knn_top1", **changes: Any) -> Recipe:
    keep = CheckpointConfig(every=4, keep=1, keep_best=key)
    probe = ProbeConfig(every=5, neighbours=5)
    return tiny.recipe(data, run, **({"checkpoint": keep, "probe": probe} | changes))


def train_with(config: Recipe) -> None:
    """Train, with evaluations that find VALUES."""
    with pytest.MonkeyPatch.context() as patch, training(config) as trainer:
        patch.setattr(
            Probe, "evaluate", lambda *_: {"knn_top1": VALUES[trainer.step], "feature_rank": 2.0}
        )
        finish(trainer)


def steps(run: str) -> list[int]:
    return checkpoint.committed_steps(run)


def opened(run: str, which: str) -> int | None:
    config = EncoderConfig(checkpoint=which)
    return open_encoder(run, config, join(1, False), lambda _: None)[0].step


def test_the_best_stays_through_a_resume(
    tiny_data: DataConfig, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = files.join(store, "run")
    train_with(recipe(tiny_data, run, steps=7))
    assert steps(run) == [5, 7]  # 5 is no multiple of 4
    train_with(recipe(tiny_data, run, steps=12))
    assert steps(run) == [10, 12]
    train_with(recipe(tiny_data, run))
    assert steps(run) == [10, 20]  # of equal ones the first
    assert f"best          {run}/checkpoints/step_00000010 (knn_top1 90.0%)" in " ".join(
        capsys.readouterr().out.split(" ")
    ).replace("\n", "")
    assert opened(run, "best") == 10
    assert opened(run, "latest") == 20


def test_an_evaluation_that_is_added_later_ranks_too(tiny_data: DataConfig, store: str) -> None:
    run = files.join(store, "run")
    some = CheckpointConfig(every=4, keep=9)
    train(recipe(tiny_data, run, checkpoint=some, steps=12, probe=tiny.NO_PROBE))
    assert steps(run) == [4, 8, 12]
    for step, value in ((4, 0.5), (8, 0.8), (12, 0.7)):
        journal.add(run, {"step": step, "linear_top1": value})
    train(recipe(tiny_data, run, "linear_top1", steps=16, probe=tiny.NO_PROBE))
    assert steps(run) == [8, 16]
    assert opened(run, "best") == 8


def test_a_better_step_without_a_checkpoint_is_named(tiny_data: DataConfig, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    some = CheckpointConfig(every=4, keep=2)
    train(recipe(tiny_data, run, checkpoint=some, steps=12, probe=tiny.NO_PROBE))
    assert steps(run) == [8, 12]
    said: list[str] = []

    def taken() -> int | None:
        said.clear()
        here = join(1, False)
        return open_encoder(run, EncoderConfig(checkpoint="best"), here, said.append)[0].step

    journal.add(run, {"step": 4, "knn_top1": 0.9})
    with pytest.raises(InputError, match=r"no checkpoint of step 4, .*has the largest knn_top1"):
        taken()
    journal.add(run, {"step": 8, "knn_top1": 0.8})
    assert taken() == 8
    assert said == [
        f"{run}: knn_top1 is largest at step 4 (90.0%), whose checkpoint is not kept; taking that "
        "of step 8 (80.0%). --checkpoint.keep-best knn_top1 of a training keeps the best one"
    ]
    journal.add(run, {"step": 12, "knn_top1": 0.9})
    assert taken() == 12
    assert said == []


def test_processes_agree(ranks: Ranks, tiny_data: DataConfig, tmp_path: Path) -> None:
    ranks.run(train_with, recipe(tiny_data, str(tmp_path / "run"), steps=12), size=2)
    assert steps(str(tmp_path / "run")) == [10, 12]


def test_only_numbers_of_checkpoints_that_are_there_count(tmp_path: Path) -> None:
    found = [None, "high", float("nan"), float("inf"), 0.5, 0.5, 0.9]
    for step, value in enumerate(found):
        journal.add(str(tmp_path), {"step": step, "knn_top1": value})
    best = find_best(str(tmp_path), "knn_top1", range(6))
    assert (best.step, best.value) == (4, 0.5)
    assert find_best(str(tmp_path), "linear_top1", range(6)).step == -1


def test_many_checkpoints_are_not_searched_for_each_record(tmp_path: Path) -> None:
    compared = 0

    class Step(int):
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return int.__eq__(self, other)

    lines = [f'{{"step": {step}, "knn_top1": {step / 1000}}}\n' for step in range(400)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert find_best(str(tmp_path), "knn_top1", [Step(n) for n in range(0, 400, 4)]).step == 396
    assert compared <= 400


def test_no_key_ranks_nothing() -> None:
    best = Best("")
    best.note(3, {"knn_top1": 0.5})
    assert best.step == -1


def test_a_run_without_the_figure_says_so(tiny_data: DataConfig, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    plain = CheckpointConfig(every=4)
    train(recipe(tiny_data, run, checkpoint=plain, steps=5, probe=tiny.NO_PROBE))
    with pytest.raises(InputError, match=r"the log has no knn_top1 of any; give .*: 4, 5$"):
        opened(run, "best")


@pytest.mark.parametrize("key", ["loss", "head_loss", "lr", "knn_k20", "a b_top1"])
def test_a_key_that_ranks_nothing_is_refused(tiny_data: DataConfig, key: str) -> None:
    with pytest.raises(InputError, match=r"^checkpoint.keep_best .*: must be a figure"):
        recipe(tiny_data, "run", key).check()
    for fine in ("linear_top1", "knn_k20_t0.07_top1", "linear_top5_on_0a1b2c", "feature_rank"):
        recipe(tiny_data, "run", fine).check()


def test_a_figure_that_is_not_measured_is_refused(tiny_data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keep_best knn_top1 is measured at evaluations: turn"):
        recipe(tiny_data, "run", probe=tiny.NO_PROBE).check()
    alone = DataConfig(train=tiny_data.train, streams=4)
    with pytest.raises(InputError, match=r"keep_best knn_top1 cannot be measured on data\.val"):
        train(recipe(alone, str(tmp_path / "run")))
