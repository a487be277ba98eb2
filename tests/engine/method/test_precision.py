"""Half precision: what overflows, and what becomes of it, whatever the number of processes."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.method.local_shards import whole
from engine.method.precision import FIRST_SCALE, MOST_SKIPS, StepGuard, slow_on
from engine.processes.parallel import ParallelConfig
from engine.recipe import Recipe
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, open_trainer
from tests.whole import parity

pytestmark = pytest.mark.versions
CPU = torch.device("cpu")
STEPS = 8


class Scaled(NamedTuple):
    """What a run in fp16 came by."""

    scales: list[float]  # after each step
    skipped: list[int]
    gradient: Tensor  # of the last step, unscaled


def take_steps(config: Recipe, first_scale: float, fault: bool) -> Scaled:
    """On a rank. `fault`: the loss is multiplied by the number of processes."""
    with patch("torch.relu", F.softplus):  # without ReLU's kinks, which rounding can cross
        trainer = open_trainer(config)
        guard = trainer.guard
        assert guard.scale is not None
        guard.scale.fill_(first_scale)
        if fault:
            scale, size = guard.scale, trainer.world.size
            guard.scale_loss = lambda loss: loss * scale * size  # type: ignore[method-assign]
            guard.divisor = lambda parameters: scale  # type: ignore[method-assign]  # noqa: ARG005
        scales, skipped, gradients = list[float](), list[int](), list[Tensor]()

        def look(_: object, arguments: Any, __: object) -> None:
            _, divisor, *_ = arguments
            found = [whole(p.grad).flatten() for p in trainer.online.parameters()]  # type: ignore[arg-type]
            gradients.append(torch.cat(found) / (divisor if divisor > 0 else 1))

        trainer.optimizer.register_step_pre_hook(look)
        with closing(trainer.batches()) as batches:
            for _ in range(STEPS):
                trainer.train_step(next(batches))
                scales.append(guard.scale.item())
                skipped.append(int(guard.skipped))
        return Scaled(scales, skipped, gradients[-1])


def run(
    ranks: Ranks, data: DataConfig, where: Path, size: int, strategy: Any, fault: bool = False
) -> Scaled:
    """From a scale at which the first steps overflow."""
    recipe = parity.recipe(
        data,
        str(where / f"{strategy}{size}"),
        precision="fp16",
        parallel=ParallelConfig(strategy=strategy, timeout=60),
    )
    # Weights that stay: else rounding grows from step to step.
    recipe = replace(recipe, schedule=replace(recipe.schedule, base_lr=0))
    found = ranks.run(take_steps, recipe, 2.0**20, fault, size=size)
    for other in found[1:]:
        assert other[:2] == found[0][:2]
    first: Scaled = found[0]
    return first


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Scaled:
    return run(ranks, tiny_data, tmp_path_factory.mktemp("alone"), 1, "auto")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_overflow_does_not_depend_on_the_processes(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path, alone: Scaled, strategy: str
) -> None:
    assert 1 <= alone.skipped[-1] < STEPS - 1  # some overflow, some do not
    for size in (2, 4):
        found = run(ranks, tiny_data, tmp_path, size, strategy)
        assert found.scales == alone.scales
        assert found.skipped == alone.skipped
        difference = (found.gradient - alone.gradient).norm() / alone.gradient.norm()
        assert difference < 0.02  # what fp16 differs by from float32


def test_a_loss_times_the_processes_is_found(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path, alone: Scaled
) -> None:
    assert run(ranks, tiny_data, tmp_path, 4, "ddp", fault=True).scales != alone.scales


@pytest.mark.parametrize("batch", [16, 256, 3000, 4096])
@pytest.mark.parametrize("processes", [1, 32])
def test_the_first_scale_is_that_of_a_row(batch: int, processes: int) -> None:
    guard = StepGuard("fp16", CPU, batch, processes)
    assert guard.scale is not None
    row = guard.scale.item() / batch  # what a row's gradient is multiplied by
    assert FIRST_SCALE <= row < 2 * FIRST_SCALE
    assert guard.scale.log2() % 1 == 0
    for _ in range(MOST_SKIPS):
        guard.update(torch.ones(()))
    assert guard.scale.item() / batch < 2.0**-10
    assert guard.skipped == MOST_SKIPS


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_without_a_scale_shares_add_up(precision: Any) -> None:
    guard = StepGuard(precision, CPU, 64, 4)
    assert guard.divisor([torch.ones(1)]) is None
    assert guard.scale_loss(torch.tensor(0.25)) == 1
    assert "scale" not in guard.state()


@pytest.mark.parametrize("supported", [False, True])
def test_a_format_that_the_cpu_emulates_is_warned_of(
    supported: bool,
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without instructions for bf16 a step takes many times as long, for no visible reason."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    finish(open_trainer(tiny.recipe(tiny_data, tmp_path, precision="bf16", steps=1)))
    line = "bf16 is emulated on this CPU and very slow there: use --precision fp32"
    assert capsys.readouterr().out.count(line) == (not supported)
    assert slow_on(CPU, "fp32") == ""


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_a_format_that_the_gpu_emulates_is_warned_of(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a T4 does. torch itself counts emulation as support, unless it is told not to."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    gpu = torch.device("cuda", 0)
    line = "bf16 is emulated on this GPU and slow there: use --precision fp16 or fp32"
    assert slow_on(gpu, "bf16") == line * (capability < (8, 0))
    assert slow_on(gpu, "fp16") == slow_on(gpu, "fp32") == ""
