"""What --debug-step tells; test_trainer.py takes a whole debug step."""

import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import debug, greeting
from engine.debug import debug_step
from engine.processes import compiling
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.training import open_trainer


def test_compiling_is_announced_before_it_takes_its_time(
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a debug step and by a run, with what a CPU gains by it."""
    recipe = tiny.recipe(tiny_data, tmp_path / "run", probe=tiny.NO_PROBE, debug_step=True)
    line = (
        "torch.compile works in the first step, which can take minutes; a CPU gains little by it, "
        "and --no-compile starts at once\n"
    )
    debug_step(open_trainer(recipe))
    assert "torch.compile" not in capsys.readouterr().out
    trainer = open_trainer(recipe)
    trainer.compile = True  # nothing is compiled, and the trainer says that something is

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "batches", stop)
    with pytest.raises(KeyboardInterrupt):
        debug_step(trainer)
    assert line in capsys.readouterr().out
    greeting.greet(trainer, 0)
    assert line in capsys.readouterr().out
    assert "CPU" not in compiling.announce(torch.device("cuda"))


@pytest.mark.parametrize(("system", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_the_memory_of_the_host(monkeypatch: pytest.MonkeyPatch, system: str, unit: int) -> None:
    """The kernel of macOS counts it in bytes, and that of Linux in kilobytes."""
    usage = SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
    monkeypatch.setattr(resource, "getrusage", lambda _: usage)
    monkeypatch.setattr(sys, "platform", system)
    assert debug._memory(torch.device("cpu")) == "host 3.0 GiB"
