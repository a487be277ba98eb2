"""What is measured of logged steps: speeds, memory, utilization, and who is slow."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console

from engine import measuring
from engine.log import journal, timer
from engine.log.metrics import LogConfig
from engine.method.byol import BYOLConfig
from engine.method.flops import count_flops, find_peak
from engine.processes.parallel import ParallelConfig
from engine.recipe import Recipe
from shards.loader import DataConfig, TrainLoader
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, train, training

SLOW = 1000  # seconds that one process is slower in each step, by its own clock


class Clock:
    """A clock that can be put forward, so that a busy machine does not disturb the test."""

    def __init__(self) -> None:
        self.forward = 0.0

    def perf_counter(self) -> float:
        return time.perf_counter() + self.forward


def train_unevenly(recipe: Recipe, slow: str) -> str:
    """Train on this rank, of which the last is slow; return what is printed."""
    printed, clock = io.StringIO(), Clock()
    with (
        patch.object(measuring, "time", clock),
        patch.object(timer, "time", clock),
        training(recipe) as trainer,
    ):

        def late(take: Callable[..., Any]) -> Callable[..., Any]:
            def take_late(*arguments: Any) -> Any:
                clock.forward += SLOW
                return take(*arguments)

            return take_late

        if trainer.world.main:
            trainer.terminal.console = Console(file=printed, width=200)
        elif slow == "step":
            trainer.train_step = late(trainer.train_step)  # type: ignore[method-assign]
        else:
            take = late(TrainLoader.__next__)
            loader = type("Late", (TrainLoader,), {"__next__": take})
            batches = trainer.batches

            def late_batches() -> Any:
                found = batches()
                found.__class__ = loader
                return found

            trainer.batches = late_batches  # type: ignore[method-assign]
        finish(trainer)
    return printed.getvalue()


def rows(text: str) -> list[list[str]]:
    """The rows of the tables of slow processes."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return [row for row in cells if len(row) == 5 and row[0].isdigit()]


@pytest.mark.parametrize("slow", ["data", "step"])
def test_slow_processes_are_named(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path, slow: str
) -> None:
    config = tiny.recipe(
        tiny_data,
        tmp_path,
        steps=10,
        probe=tiny.NO_PROBE,
        parallel=ParallelConfig("ddp", timeout=60),
        log=LogConfig(every=2, ranks_every="2/3 epochs"),  # of 6 steps
    )
    text = ranks.run(train_unevenly, config, slow, size=2)[0]
    found = rows(text)
    assert text.count("slowest of 2 processes") == 3  # after steps 4 and 8, and at the end
    assert [row[0] for row in found] == ["1", "0"] * 3
    for slower, other in zip(found[::2], found[1::2], strict=True):
        assert SLOW <= float(slower[4]) < SLOW + 100
        assert SLOW <= float(slower[2]) < SLOW + 100
        assert float(other[4]) <= float(other[2]) < 100
        assert (float(slower[3].rstrip("%")) > 90) == (slow == "data")
    for record in journal.read(str(tmp_path)):
        assert record["images_per_second_device"] == record["images_per_second"] / 2


def test_one_process_has_no_table_and_no_utilization(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, steps=3, probe=tiny.NO_PROBE))
    assert "slowest" not in capsys.readouterr().out
    for record in journal.read(str(tmp_path)):
        assert record["images_per_second_device"] == record["images_per_second"]
        assert 0.05 < record["memory_gib"] < 1000
        assert "mfu" not in record


def test_utilization_where_the_peak_is_known(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "find_device_peak", lambda _: 1e9)
    config = tiny.recipe(tiny_data, tmp_path, steps=2, probe=tiny.NO_PROBE)
    train(config)
    flops = count_flops(config.model, 8, config.views.size)
    for record in journal.read(str(tmp_path)):
        assert record["mfu"] == record["images_per_second"] * flops / 1e9


def test_operations_of_the_papers_network() -> None:
    """By hand: torchvision's table has 4.089 G multiplications for ResNet-50."""
    encoder, stem = 4.089e9 - 2048 * 1000, 64 * 147 * 112**2
    projector, predictor = 2048 * 4096 + 4096 * 256, 2 * 256 * 4096
    # The backward takes two more for each one, except for the pixels, which need no gradient.
    online = 3 * (encoder + projector + predictor) - stem
    by_hand = 2 * 2 * (online + encoder + projector)  # views; a multiplication and an addition
    assert count_flops(BYOLConfig(), 0, 224) == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize(
    ("gpu", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", True, 989.4e12),
        ("NVIDIA H100 PCIe", "fp16", True, 756e12),
        ("NVIDIA H200", "fp32", True, 494.7e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", False, 19.5e12),
        ("NVIDIA A10", "bf16", True, 125e12),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
        ("NVIDIA A100-SXM4-80GB", "fp64", True, None),
        ("NVIDIA RTX A4000", "bf16", True, None),
        ("an A1000", "bf16", True, None),
    ],
)
def test_peaks_of_gpus(gpu: str, precision: Any, tf32: bool, peak: float | None) -> None:
    assert find_peak(gpu, precision, tf32) == peak
