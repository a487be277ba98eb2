"""Checkpoints beside the training: of one moment, one at a time, and what becomes of failures."""

import copy
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from engine.method.local_shards import local
from engine.processes.parallel import ParallelConfig
from engine.processes.world import World
from engine.recipe import Recipe
from engine.state import checkpoint, saver
from engine.state.checkpoint import CheckpointConfig
from engine.state.saver import Saver
from shards.errors import InputError
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, open_trainer, train
from tests.whole.parity import SGDConfig

pytestmark = pytest.mark.versions

ALONE = World(0, 1, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "BACKOFF", 0.01)


def test_what_is_written_is_the_state_of_the_call() -> None:
    """Parameters, and buffers as a batch norm's that the next forward changes."""
    norm = torch.nn.BatchNorm1d(3)
    state = {"model": norm.state_dict(), "optimizer": {"weight": {"momentum": torch.ones(3)}}}
    go_on, written = threading.Event(), []

    def write(staged: dict[str, Any], _: World) -> None:
        go_on.wait(60)
        written.append(copy.deepcopy(staged))

    with Saver(ALONE, True, print) as saves:
        for _ in range(2):
            expected = copy.deepcopy(state)
            go_on.clear()
            saves.save(1, state, write)
            norm(torch.randn(8, 3))
            with torch.no_grad():
                norm.weight.add_(1)
            state["optimizer"]["weight"]["momentum"].mul_(2)
            go_on.set()
            assert saves.wait()
            torch.testing.assert_close(written[-1], expected, rtol=0, atol=0)


def test_one_save_at_a_time() -> None:
    """Each writes its own state: no later one is copied over it meanwhile."""
    written: list[list[float]] = []

    def write(staged: dict[str, Any], _: World) -> None:
        time.sleep(0.01)  # so that a later save could come
        written.append(staged["a"].unique().tolist())

    with Saver(ALONE, True, print) as saves:
        for step in range(20):
            saves.save(step, {"a": torch.full((1000,), float(step))}, write)
        assert saves.wait()
    assert written == [[step] for step in range(20)]


@pytest.mark.parametrize(("failures", "committed"), [(2, True), (3, False)])
def test_a_failed_save_is_tried_again_and_then_reported(failures: int, committed: bool) -> None:
    tries: list[int] = []
    reports: list[str] = []

    def write(_: dict[str, Any], __: World) -> None:
        tries.append(1)
        if len(tries) <= failures:
            raise OSError("bucket is full")

    with Saver(ALONE, True, reports.append) as saves:
        saves.save(7, {}, write)
        assert saves.wait() == committed
    assert len(tries) == 3
    assert reports == [
        "the checkpoint of step 7 (0 bytes of tensors) failed (1 of 3): bucket is full",
        "the checkpoint of step 7 was saved at attempt 3"
        if committed
        else "the checkpoint of step 7 was not saved; training goes on",
    ]


def test_an_unexpected_error_is_not_swallowed() -> None:
    def write(_: dict[str, Any], __: World) -> None:
        raise ZeroDivisionError

    with Saver(ALONE, True, print) as saves:
        saves.save(1, {}, write)
        with pytest.raises(ZeroDivisionError):
            saves.wait()


# In a training ----------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """All attempts to save at `steps` fail."""
    save = checkpoint.write

    def other(run: str, step: int, *rest: Any) -> Any:
        if step in steps:
            raise OSError("no space")
        return save(run, step, *rest)

    monkeypatch.setattr(checkpoint, "write", other)


def test_training_goes_on_without_a_checkpoint(
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(monkeypatch, {4, 8})
    train(tiny.recipe(tiny_data, tmp_path, steps=12, probe=tiny.NO_PROBE))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000012"]
    told = capsys.readouterr().out
    assert told.count("no space") == 1
    assert "the checkpoint of step 8 was not saved, nor the 1 before it, as above; training" in told
    assert (
        "the checkpoint of step 12 was saved at attempt 1, and the 2 before it were not\n" in told
    )


@pytest.mark.parametrize("background", [True, False])
def test_the_last_state_must_be_saved(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    failing(monkeypatch, {6})
    how = CheckpointConfig(every=4, background=background)
    recipe = tiny.recipe(tiny_data, tmp_path, steps=6, probe=tiny.NO_PROBE, checkpoint=how)
    with pytest.raises(OSError, match="the state of step 6 could not be saved"):
        train(recipe)


def test_a_save_that_was_begun_outlives_a_fault_of_the_data(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, steps=12, probe=tiny.NO_PROBE))
    save, train_step, failed = checkpoint.write, trainer.train_step, threading.Event()

    def late(*arguments: Any) -> Any:
        failed.wait(60)
        return save(*arguments)

    def fail(batch: Any) -> Any:
        if trainer.step == 5:
            failed.set()
            raise InputError("a shard is gone")
        return train_step(batch)

    monkeypatch.setattr(checkpoint, "write", late)
    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(InputError, match="a shard is gone"):
        finish(trainer)
    assert checkpoint.verify(checkpoint.step_url(str(tmp_path), 4), ALONE).step == 4


def tensors(state: Any) -> list[torch.Tensor]:
    """What this process holds of a state."""
    return local(tree_leaves(state))


def train_while_saving(recipe: Recipe) -> bool:
    """On a rank: saves take until two steps later; what they hold is compared with a copy."""
    trainer = open_trainer(recipe)
    expected: dict[int, Any] = {}
    save, train_step = checkpoint.write, trainer.train_step
    reached = {4: threading.Event(), 8: threading.Event(), 12: threading.Event()}
    same = []

    def note(batch: Any) -> Any:
        output = train_step(batch)
        step = trainer.step
        if step in reached:
            expected[step] = [t.clone() for t in tensors(trainer.state())]
        for late in reached:
            if step >= late + 2:
                reached[late].set()
        return output

    def late(run: str, step: int, state: Any, *rest: Any) -> Any:
        if step < 12:
            assert reached[step].wait(60)
        try:
            torch.testing.assert_close(tensors(state), expected[step], rtol=0, atol=0)
            same.append(step)
        finally:
            commit = save(run, step, state, *rest)
        return commit

    trainer.train_step = note  # type: ignore[method-assign]
    with mock.patch.object(checkpoint, "write", late):
        finish(trainer)
    return same == [4, 8, 12]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_of_a_checkpoint_is_of_one_step(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path, strategy: Any
) -> None:
    recipe = tiny.recipe(
        tiny_data,
        tmp_path,
        steps=12,
        probe=tiny.NO_PROBE,
        optimizer=SGDConfig(),
        parallel=ParallelConfig(strategy, timeout=60),
        checkpoint=CheckpointConfig(every=4),
    )
    assert ranks.run(train_while_saving, recipe, size=2) == [True, True]
