"""A wait for images: a signal ends it with the last finished step saved, and a long one is told."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import waiting
from engine.state.checkpoint import CheckpointConfig
from engine.trainer import Trainer
from shards.loader import DataConfig, TrainLoader
from shards.loader_process import ProcessLoader
from tests.engine.test_trainer import comparable
from tests.helpers import tiny
from tests.helpers.training import finish, open_trainer, train

pytestmark = pytest.mark.versions


@contextmanager
def stalling(trainer: Trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From that step on, no more images come, and then a signal."""
    gate = threading.Event()
    waits: list[float] = []

    def wait(loader: Any, seconds: float) -> bool:
        if trainer.step < step:
            return bool(usual(loader, seconds))
        waits.append(seconds)
        if len(waits) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return gate.wait(seconds)

    usual = TrainLoader.wait
    monkeypatch.setattr(TrainLoader, "wait", wait)
    monkeypatch.setattr(waiting, "PATIENCE", 0.1)
    yield
    gate.set()


@pytest.mark.parametrize(("every", "saves"), [(4, [4, 6]), (3, [3, 6])])
def test_a_signal_ends_the_wait_for_images(
    tiny_data: DataConfig,
    tmp_path: Path,
    every: int,
    saves: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The last finished step is saved, once, and the run goes on as one that never waited."""
    config = CheckpointConfig(every=every)
    recipe = tiny.recipe(tiny_data, tmp_path / "run", steps=9, checkpoint=config)
    trainer = open_trainer(recipe)
    saved: list[int] = []
    save = trainer.run.save

    def note(step: int, *given: Any) -> None:
        saved.append(step)
        save(step, *given)

    monkeypatch.setattr(trainer.run, "save", note)
    with stalling(trainer, 6, monkeypatch):
        assert finish(trainer)
    assert saved == saves
    told = capsys.readouterr().out
    assert "stopped after step 6 by SIGTERM" in told
    line = f"waits for the images of step 7 for 0.1 s: does {tiny_data.train} answer?"
    assert told.count(line) == 1
    monkeypatch.undo()
    train(recipe)
    train(replace(recipe, run=str(tmp_path / "calm")))
    assert comparable(tmp_path / "run") == comparable(tmp_path / "calm")


def test_a_stopped_process_that_loads(
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run is saved, and the process is ended."""
    data = replace(tiny_data, own_process=True)
    long = replace(tiny.recipe(data, tmp_path).schedule, epochs=100)
    trainer = open_trainer(tiny.recipe(data, tmp_path, probe=tiny.NO_PROBE, schedule=long))
    batches, children = trainer.batches, []
    train_step, report = trainer.train_step, trainer.terminal.report

    def opened() -> ProcessLoader:
        loader = batches()
        assert isinstance(loader, ProcessLoader)
        children.extend(loader._children)
        return loader

    def stop(batch: Any) -> Any:
        if trainer.step == 3:
            for child in children:
                child.send_signal(signal.SIGSTOP)
        return train_step(batch)

    def tell(text: str) -> None:
        report(text)
        if text.startswith("waits for the images") and trainer.step > 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "batches", opened)
    monkeypatch.setattr(trainer, "train_step", stop)
    monkeypatch.setattr(trainer.terminal, "report", tell)
    monkeypatch.setattr(waiting, "PATIENCE", 2.0)
    assert finish(trainer)
    text = capsys.readouterr().out
    assert f"stopped after step {trainer.step} by SIGTERM" in text
    assert "is stopped, and kill -CONT" in text
    assert (tmp_path / f"checkpoints/step_{trainer.step:08d}/commit.json").exists()
    assert all(child.poll() is not None for child in children)
