"""A few steps of a small run under any strategy, and how far two such runs are apart."""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.evaluation.during_training import ProbeConfig
from engine.method.byol import BYOLConfig
from engine.method.lars import LARS, LARSConfig
from engine.method.local_shards import whole
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from engine.recipe import Recipe
from engine.trainer import Trainer
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.views import ViewsConfig
from tests.helpers import tiny
from tests.helpers.training import open_trainer

Tensors = dict[str, Tensor]
STEPS = 5
KINDS = ("first gradient", "last gradient", "online", "target", "statistics")


@dataclass(frozen=True)
class SGDConfig(LARSConfig):
    """Plain momentum SGD, which does not hide a gradient of the wrong length as LARS does."""

    momentum: float = 0.5

    def build(self, module: torch.nn.Module, shard_group: Any = None) -> LARS:
        optimizer = super().build(module, shard_group)
        for group in optimizer.param_groups:
            group["adapt"] = False
        return optimizer


def recipe(data: DataConfig, run: str, **changes: Any) -> Recipe:
    """24 images of 8 pixels, in 4 streams; three ranks get 6, 6 and 12 of them."""
    optimizer = changes.pop("optimizer", LARSConfig())
    micro = changes.pop("micro", 1)
    lr = 0.02 if isinstance(optimizer, SGDConfig) else 4.0
    return tiny.recipe(
        data,
        run,
        batch=BatchConfig(size=24, micro=micro),
        model=BYOLConfig(ResNetConfig(10, width=0.125, stem="cifar"), hidden=32, projection=16),
        views=ViewsConfig(size=8),
        schedule=ScheduleConfig(epochs=5, warmup=0, base_lr=lr, base_tau=0.9),
        optimizer=optimizer,
        probe=ProbeConfig(),
        **changes,
    )


@dataclass
class Outcome:
    """What a run left behind, as whole tensors, and the ids of the samples that this rank saw."""

    tensors: dict[str, Tensors]
    ids: list[list[int]]
    strategy: str


def take_steps(
    config: Recipe, fault: Callable[[Trainer], None] | None = None, backend: str = "inductor"
) -> Outcome:
    """Build the trainer on this rank, plant a `fault`, and take five steps.

    `backend`: of torch.compile, where the recipe compiles.

    With softplus for ReLU: an activation that changes its sign in rounding, at a ReLU's kink, moves
    gradients by far more than rounding does, in about every fourth run of one process alone.
    """
    made = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    with patch("torch.relu", F.softplus), patch("engine.processes.compiling.compiled", made):
        return _take_steps(config, fault)


def _take_steps(config: Recipe, fault: Callable[[Trainer], None] | None) -> Outcome:
    trainer = open_trainer(config)
    gradients: list[Tensors] = []

    def keep(*_: object) -> None:
        found = {}
        for name, p in trainer.online.named_parameters():
            assert p.grad is not None
            found[name] = whole(p.grad).detach().double().clone()
        gradients.append(found)

    if fault is not None:
        fault(trainer)
    trainer.optimizer.register_step_pre_hook(keep)
    ids = []
    with closing(trainer.batches()) as batches:
        for _ in range(STEPS):
            batch = next(batches)
            ids.append(batch.ids.tolist())
            trainer.train_step(batch)
    tensors = {"first gradient": gradients[0], "last gradient": gradients[-1]}
    for kind, network in (("online", trainer.online), ("target", trainer.target)):
        tensors[kind] = {n: whole(p).detach().double() for n, p in network.named_parameters()}
    tensors["statistics"] = {
        f"{kind}.{name}": value.double()
        for kind, network in (("online", trainer.online), ("target", trainer.target))
        for name, value in network.state_dict().items()
        if "running" in name
    }
    return Outcome(tensors, ids, trainer.parallel.strategy)


# A bias before a batch norm has no effect: its gradient is rounding around an exact zero.
NO_EFFECT = ("projector.0.bias", "predictor.0.bias")


def distances(found: Outcome, yardstick: Outcome) -> dict[str, float]:
    """For each kind, the root mean square over its tensors of their relative difference."""
    return {kind: _distance(found.tensors[kind], yardstick.tensors[kind]) for kind in KINDS}


def _distance(found: Tensors, yardstick: Tensors) -> float:
    assert found.keys() == yardstick.keys()
    relative = [
        ((found[name] - exact).norm() / exact.norm().clamp(min=1e-30)).square()
        for name, exact in yardstick.items()
        if name not in NO_EFFECT
    ]
    found_one = torch.stack(relative).mean().sqrt().item()
    assert math.isfinite(found_one)  # nan would get lost in a maximum
    return found_one
