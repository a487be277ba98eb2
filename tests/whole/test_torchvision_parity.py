"""Torchvision's networks take the same steps in every strategy, compiled and recomputed or not.

Everything is computed in float64, so that what a different order of sums changes stays tiny.
"""

import dataclasses
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from engine.method.byol import BYOLConfig
from engine.method.local_shards import whole
from engine.method.torchvision_encoder import TorchvisionConfig
from engine.processes.parallel import ParallelConfig
from engine.recipe import Recipe
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.views import ViewsConfig
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import open_trainer
from tests.whole.parity import SGDConfig

pytestmark = pytest.mark.versions

STEPS = 2
FAST = "shufflenet_v2_x0_5"
SLOW = [
    *(
        "resnet18",
        "mobilenet_v3_small",
        "mnasnet0_5",
        "regnet_y_400mf",
        "efficientnet_b0",
        "densenet121",
        "resnext50_32x4d",
    ),
    *("googlenet", "mobilenet_v2", "convnext_tiny", "swin_t", "vit_b_16", "inception_v3"),
]
SIZES = {"inception_v3": 80}


def recipe(name: str, data: DataConfig, run: Path, **changes: Any) -> Recipe:
    """12 images in 4 streams, by SGD, which does not hide gradients of a wrong length."""
    model = BYOLConfig(TorchvisionConfig(name), hidden=32, projection=16)
    base = tiny.recipe(data, run, model=model, probe=tiny.NO_PROBE, precision="fp64", **changes)
    return dataclasses.replace(
        base,
        batch=BatchConfig(size=12),
        views=ViewsConfig(size=SIZES.get(name, 32)),
        optimizer=SGDConfig(),
        schedule=dataclasses.replace(base.schedule, epochs=5, warmup="0 epochs", base_lr=2.0),
    )


def take_steps(config: Recipe) -> dict[str, Tensor]:
    """Take the steps on this rank, and return all tensors of both networks, whole."""
    made = partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")
    with patch("engine.processes.compiling.compiled", made):
        trainer = open_trainer(config)
        with closing(trainer.batches()) as batches:
            for _ in range(STEPS):
                trainer.train_step(next(batches))
    return {
        f"{kind}.{name}": whole(value).detach().double()
        for kind, network in (("online", trainer.online), ("target", trainer.target))
        for name, value in network.state_dict().items()
    }


def spread(strategy: Any, **more: Any) -> dict[str, Any]:
    return {"parallel": ParallelConfig(strategy=strategy, timeout=60, **more)}


CELLS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp 2": (2, spread("ddp")),
    "fsdp 2": (2, spread("fsdp")),
    "fsdp 2, recomputed": (2, spread("fsdp", recompute=True)),
    "compiled": (1, {"compile": True}),
}
CASES = [
    *((FAST, cell) for cell in ("ddp 2", "fsdp 2, recomputed")),
    *(
        pytest.param(name, cell, marks=pytest.mark.slow)
        for name in (FAST, *SLOW)
        for cell in CELLS
        if (name, cell) not in ((FAST, "ddp 2"), (FAST, "fsdp 2, recomputed"))
    ),
]


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process computes, which is the same for all cells of a network."""

    @cache
    def run(name: str) -> dict[str, Tensor]:
        config = recipe(name, tiny_data, tmp_path_factory.mktemp("alone"))
        (found,) = ranks.run(take_steps, config, size=1)
        return found  # type: ignore[no-any-return]

    return run


@pytest.mark.parametrize(("name", "cell"), CASES)
def test_all_ways_of_computing_agree(
    ranks: Ranks, alone: Any, tiny_data: DataConfig, tmp_path: Path, name: str, cell: str
) -> None:
    size, changes = CELLS[cell]
    expected = alone(name)
    for found in ranks.run(take_steps, recipe(name, tiny_data, tmp_path, **changes), size=size):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-9, msg=key)
