"""The norms of a step's gradient and update, against those of whole tensors in float64."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.measuring import Meter
from engine.method.adamw import AdamWConfig
from engine.method.lars import LARSConfig
from engine.method.local_shards import whole
from engine.processes.parallel import ParallelConfig
from engine.recipe import Recipe
from engine.trainer import Trainer
from shards.loader import DataConfig
from tests.helpers.ranks import Ranks
from tests.helpers.training import open_trainer
from tests.whole import parity

Figures = dict[str, float | None]


def weights(trainer: Trainer) -> list[Tensor]:
    return [whole(p).detach().double().clone() for p in trainer.online.parameters() if p.ndim > 1]


def length(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


def measure(config: Recipe, scale: float = 0, harm: bool = False) -> tuple[Figures, Figures]:
    """Take steps on this rank; return the figures of the last one, as logged and as expected."""
    trainer = open_trainer(config)
    trainer.step = 2
    if scale and trainer.guard.scale is not None:
        trainer.guard.scale.fill_(scale)
    gradients: list[Tensor] = []

    def look(*_: object) -> None:
        divisor = 1 if trainer.guard.scale is None else trainer.guard.scale / trainer.world.size
        found = [whole(p.grad) for p in trainer.online.parameters() if p.grad is not None]
        gradients[:] = [g.double() / divisor for g in found]

    trainer.optimizer.register_step_pre_hook(look)
    if harm:
        next(trainer.online.parameters()).register_hook(lambda grad: grad * math.inf)
    meter = Meter(trainer)
    with contextlib.closing(trainer.batches()) as batches:
        for _ in range(2):
            before = weights(trainer)
            batch = next(batches)
            output = meter.take_step(batch)
    found = meter.read(output, batch)
    moved = [new - old for new, old in zip(weights(trainer), before, strict=True)]
    ratio = length(moved) / length(before)
    expected: Figures = {"grad_norm": length(gradients), "update_ratio": ratio}
    return {name: found[name] for name in expected}, expected


def spread(strategy: Any, **more: Any) -> dict[str, Any]:
    return {"parallel": ParallelConfig(strategy=strategy, timeout=60, **more)}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": LARSConfig()},
        {"optimizer": AdamWConfig(), "micro": 2},
        {"optimizer": LARSConfig(), "precision": "fp16"},
        {"optimizer": AdamWConfig(), "precision": "fp64"},
    ],
    ids=["lars", "adamw, micro", "lars, fp16", "adamw, fp64"],
)
def test_one_process(tiny_data: DataConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    found, expected = measure(parity.recipe(tiny_data, str(tmp_path), **changes), scale=1024)
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(expected.values())


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (3, spread("ddp")),  # the ranks hold 6, 6 and 12 rows
        (2, spread("fsdp") | {"micro": 2}),
        (4, spread("hsdp", shard=2)),
        (2, spread("fsdp") | {"precision": "fp16"}),
    ],
    ids=["ddp 3", "fsdp 2, micro", "hsdp 2x2", "fsdp 2, fp16"],
)
def test_processes(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path, size: int, changes: dict[str, Any]
) -> None:
    """Every process has the figures of the whole network and of the global batch."""
    config = parity.recipe(tiny_data, str(tmp_path), optimizer=parity.SGDConfig(), **changes)
    answers = ranks.run(measure, config, 1024, size=size)
    for found, expected in answers:
        assert found == answers[0][0]
        assert found == pytest.approx(expected, rel=1e-6)
    if config.precision == "fp32":
        alone = parity.recipe(
            tiny_data, str(tmp_path), optimizer=parity.SGDConfig(), micro=config.batch.micro
        )
        # Rounding flips signs at ReLU's kinks, so processes and one process differ by more than it.
        assert answers[0][0] == pytest.approx(measure(alone)[0], rel=1e-2)


def test_a_skipped_step(tiny_data: DataConfig, tmp_path: Path) -> None:
    found, _ = measure(parity.recipe(tiny_data, str(tmp_path)), harm=True)
    assert found == {"grad_norm": None, "update_ratio": 0}


def test_steps_that_are_not_logged_are_not_measured(tiny_data: DataConfig, tmp_path: Path) -> None:
    trainer = open_trainer(parity.recipe(tiny_data, str(tmp_path)))
    meter = Meter(trainer)
    meter.logs = lambda step: step == 1  # type: ignore[method-assign]
    with contextlib.closing(trainer.batches()) as batches:
        for step in (1, 2):
            batch = next(batches)
            output = meter.take_step(batch)
            assert ("grad_norm" in meter.read(output, batch)) == (step == 1)
    assert not meter._norms._before
