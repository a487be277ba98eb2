"""Runs with each kind of optimizer and clipping: on several processes, and after a resume."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from engine.log.metrics import TIMINGS
from engine.method.clipping import ClipConfig
from engine.method.lars import LARSConfig
from engine.method.local_shards import whole
from engine.method.schedule import ScheduleConfig
from engine.method.sgd import SGDConfig
from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.processes.parallel import ParallelConfig
from engine.recipe import Recipe
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import open_trainer, train
from tests.whole import parity

BOTH = ClipConfig(norm=0.05, value=0.01)
CELLS: dict[str, tuple[Any, float, ClipConfig]] = {  # optimizer, base rate at batch 256, clipping
    "lars": (LARSConfig(weight_decay=1e-2), 40.0, BOTH),
    "sgd": (SGDConfig(nesterov=True), 1.0, BOTH),
    "lars_nadam": (TorchOptimizerConfig("NAdam", weight_decay=1e-2, adapt=True), 0.02, BOTH),
}


def outcome(ranks: Ranks, data: DataConfig, run: Path, cell: str, size: int, **more: Any) -> Any:
    optimizer, lr, clip = CELLS[cell]
    schedule = ScheduleConfig(epochs=5, warmup=0, base_lr=lr, base_tau=0.9)
    config = parity.recipe(data, str(run), precision="fp64", optimizer=optimizer)
    changes: dict[str, Any] = {"schedule": schedule, "clip": clip} | more
    config = dataclasses.replace(config, **changes)
    return ranks.run(parity.take_steps, config, size=size)[0].tensors["online"]


@pytest.mark.parametrize("cell", CELLS)
def test_processes_take_the_steps_of_one(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path, cell: str
) -> None:
    alone = outcome(ranks, tiny_data, tmp_path / "alone", cell, 1)
    free = outcome(ranks, tiny_data, tmp_path / "free", cell, 1, clip=ClipConfig())
    for strategy in ("ddp", "fsdp"):
        spread: Any = {"parallel": ParallelConfig(strategy, timeout=60)}
        found = outcome(ranks, tiny_data, tmp_path / strategy, cell, 2, **spread)
        for name, value in alone.items():
            if name in parity.NO_EFFECT:
                continue
            far = (value - free[name]).norm()
            assert (found[name] - value).norm() < 1e-7 * max(far, 1e-3 * value.norm()), name
            assert far > 1e-6 * value.norm(), name  # so the clipping is seen


def contents(config: Recipe) -> tuple[list[Any], dict[str, Any]]:
    """The log of a run, and its tensors as a start of one process reads them."""
    lines = [
        json.loads(line) for line in Path(config.run, "metrics.jsonl").read_text().splitlines()
    ]
    state = tree_map(lambda t: whole(t).detach().clone(), open_trainer(config).state())
    return [{k: v for k, v in one.items() if k not in TIMINGS} for one in lines], state


RESUMED: dict[str, Any] = {
    "sgd": {"optimizer": SGDConfig()},
    "asgd, none": {
        "optimizer": TorchOptimizerConfig("ASGD"),
        "schedule": ScheduleConfig(epochs=1, warmup=1, base_lr=0.2, lr_decay="none"),
    },
    "lars_nadam, clip": {"optimizer": TorchOptimizerConfig("NAdam", adapt=True), "clip": BOTH},
}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
def test_resumed_run_equals_the_whole_one(
    tiny_data: DataConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            config = tiny.recipe(
                tiny_data, tmp_path / name, probe=tiny.NO_PROBE, steps=steps, **changes
            )
            train(config)
    whole_run, parts = (
        contents(dataclasses.replace(config, run=str(tmp_path / name)))
        for name in ("whole", "parts")
    )
    assert parts[0] == whole_run[0]
    torch.testing.assert_close(parts[1], whole_run[1], rtol=0, atol=0)


def test_the_rate_of_a_run_without_decay_stays(tiny_data: DataConfig, tmp_path: Path) -> None:
    schedule = ScheduleConfig(epochs=1, warmup=2, base_lr=1.6, lr_decay="none")
    config = tiny.recipe(tiny_data, tmp_path, probe=tiny.NO_PROBE, schedule=schedule)
    train(config)
    assert [line["lr"] for line in contents(config)[0]] == [0.0, 0.05, *[0.1] * 4]


def test_a_run_of_two_processes_goes_on_with_one(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path
) -> None:
    optimizer, lr, clip = CELLS["lars_nadam"]
    base = tiny.recipe(
        tiny_data,
        tmp_path / "alone",
        optimizer=optimizer,
        clip=clip,
        precision="fp64",
        probe=tiny.NO_PROBE,
        schedule=ScheduleConfig(epochs=1, warmup=1, base_lr=lr),
        steps=4,
    )
    elastic = dataclasses.replace(base, run=str(tmp_path / "elastic"))
    spread = dataclasses.replace(elastic, parallel=ParallelConfig("fsdp", timeout=60), steps=2)
    train(base)
    ranks.run(train, spread, size=2)
    train(elastic)
    (_, expected), (_, found) = contents(base), contents(elastic)
    for key in ("online", "optimizer"):
        for name in parity.NO_EFFECT:
            del expected[key][name], found[key][name]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
