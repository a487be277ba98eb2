"""The comparison with lightly trains both sides as long as the time allows, and measures both."""

import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from engine.encoder.torchvision_twin import stock_network
from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.recipe import Recipe
from launch import bench
from launch.benchmarks import accuracy
from launch.benchmarks.accuracy import PILOT
from launch.benchmarks.lightly_byol import check_optimizer
from launch.benchmarks.measuring import Cost
from shards.errors import InputError
from tests.helpers.benches import rows, run

RECIPE = """
from pathlib import Path
from tests.helpers import tiny

recipe = tiny.recipe(tiny.draw_data(Path("{folder}")), "run")
"""


class Stub:
    """Stands in for lightly's side, which is not installed with the tests."""

    made: ClassVar[list["Stub"]] = []

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.backbone = stock_network(recipe.model.encoder, recipe.views.size).to(device)
        self.seed, self.rates = recipe.seed, list[tuple[float, float]]()
        Stub.made.append(self)

    def step(self, _1: Tensor, _2: Tensor, lr: float, tau: float) -> None:
        self.rates.append((lr, tau))

    @staticmethod
    def load_views(contents: list[bytes], *_: Any) -> Generator[tuple[Tensor, Tensor]]:
        assert len(contents) == 96  # all images of an epoch's batches
        while True:
            yield torch.zeros(()), torch.zeros(())


def test_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "check_installed", lambda: None)
    monkeypatch.setattr(accuracy, "LightlyBYOL", Stub)
    monkeypatch.setattr(accuracy, "load_views", Stub.load_views)
    monkeypatch.setattr(accuracy, "_count_steps", lambda *_: 3)
    monkeypatch.setattr(Stub, "made", [])
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(folder=tmp_path))
    options = "--core-seconds 1 --rounds 2 --precision fp32"
    assert bench.main(f"accuracy --recipe {path} {options}".split()) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [rows(lines, name) for name in ("kNN top-1", "epochs", "CPU time")] == [1, 1, 1]
    assert printed.err.count("kNN top-1") == 4  # each side in each round

    pilot, *trained = Stub.made
    assert pilot.rates == []
    assert [stub.seed for stub in trained] == [0, 1]
    for stub in trained:  # each training takes the whole schedule: the warm-up, and the fall to 0
        lrs, taus = zip(*stub.rates, strict=True)
        assert len(lrs) == 3
        assert max(lrs) == lrs[0] > lrs[1] > lrs[2] > 0
        assert taus[0] < taus[1] < taus[2] < 1


def test_the_time_tells_the_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of some steps counts, and those before them settle."""
    taken = list[None]()

    def train() -> Generator[None]:
        while True:
            taken.append(None)
            yield

    def measure(work: Callable[[], object], images: int) -> Cost:
        before = len(taken)
        work()
        assert (before, len(taken), images) == (PILOT, 2 * PILOT, PILOT)
        return Cost(wall=9.0, cpu=0.25, memory=0)

    monkeypatch.setattr(accuracy, "measure", measure)
    assert accuracy._count_steps(train(), 10.0) == 40


def test_an_order_of_its_own_for_each_epoch() -> None:
    places = accuracy._shuffle(10, seed=0)
    epochs = [[next(places) for _ in range(10)] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]


def test_a_peer_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    assert bench.main(["accuracy"]) == 1
    assert "error: lightly is not installed" in capsys.readouterr().err


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(InputError, match="--recipe has the optimizer TorchOptimizerConfig"):
        check_optimizer(Recipe(optimizer=TorchOptimizerConfig("SGD")))
    check_optimizer(Recipe())


def test_lightly_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With lightly itself, where it is installed, both sides run."""
    pytest.importorskip("lightly")
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(folder=tmp_path))
    lines = run(f"accuracy --recipe {path} --core-seconds 2 --rounds 1 --precision fp32", capsys)
    assert rows(lines, "kNN top-1") == 1
