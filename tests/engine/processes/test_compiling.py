"""Networks and functions are compiled where the machine has a compiler."""

from functools import partial
from pathlib import Path

import pytest
import torch

from engine.processes import compiling
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.training import finish, open_trainer

pytestmark = pytest.mark.versions


def test_without_a_compiler_training_goes_on(
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, compile=True, steps=1))
    finish(trainer)
    output = capsys.readouterr().out
    line = "compile: no C++ compiler (no-such-compiler) found; going on without torch.compile"
    assert output.count(line) == 1
    assert not (tmp_path / "compile").exists()


def test_a_partial_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the augmentation is one."""
    traced = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    double = compiling.compiled(partial(torch.mul, other=2))
    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
