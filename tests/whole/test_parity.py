"""Every strategy at every world size computes the same update.

The yardstick is one process in float64. No way of spreading the work may be further from it, after
five steps, than three times what one process in float32 is.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.method.byol import update_target
from engine.method.lars import LARSConfig
from engine.method.local_shards import local
from engine.method.norm import BatchNorm
from engine.processes.parallel import ParallelConfig
from engine.trainer import Trainer
from shards.loader import DataConfig
from tests.helpers.ranks import Ranks
from tests.whole import parity
from tests.whole.parity import KINDS, Outcome, SGDConfig, distances, take_steps

pytestmark = pytest.mark.versions

OPTIMIZERS = {"sgd": SGDConfig(), "lars": LARSConfig()}
FACTOR = 3
# What two ways of rounding may differ by where a single float32 process happens to be exact.
ROUNDING = 2e-7


class Bench:
    """Runs cells of the matrix, and the yardsticks once."""

    def __init__(self, ranks: Ranks, data: DataConfig, folder: Path) -> None:
        self.ranks, self.data, self.folder = ranks, data, folder
        self._runs = 0
        self.yardsticks = cache(self._yardsticks)

    def run(self, size: int, **changes: Any) -> list[Outcome]:
        fault, machine = changes.pop("fault", None), changes.pop("machine", None)
        backend = changes.pop("backend", "inductor")
        self._runs += 1
        config = parity.recipe(self.data, str(self.folder / str(self._runs)), **changes)
        return self.ranks.run(take_steps, config, fault, backend, size=size, machine=machine)

    def _yardsticks(self, optimizer: str, micro: int) -> tuple[Outcome, dict[str, float]]:
        """The float64 run, and the float32 one's distance from it."""
        method = {"optimizer": OPTIMIZERS[optimizer], "micro": micro}
        (exact,) = self.run(1, precision="fp64", **method)
        (single,) = self.run(1, **method)
        return exact, distances(single, exact)

    def ratios(self, optimizer: str, size: int, micro: int = 1, **changes: Any) -> dict[str, float]:
        """How many times as far from float64 as one float32 process the cell is, worst rank."""
        exact, single = self.yardsticks(optimizer, micro)
        method = {"optimizer": OPTIMIZERS[optimizer], "micro": micro}
        outcomes = self.run(size, **method, **changes)
        found = [distances(outcome, exact) for outcome in outcomes]
        return {
            kind: max(distance[kind] for distance in found) / max(single[kind], ROUNDING)
            for kind in KINDS
        }


@pytest.fixture(scope="module")
def bench(ranks: Ranks, tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(ranks, tiny_data, tmp_path_factory.mktemp("parity"))


def spread(strategy: Any, **more: Any) -> dict[str, Any]:
    return {"parallel": ParallelConfig(strategy=strategy, timeout=60, **more)}


CELLS = {
    "ddp 2": (2, spread("ddp")),
    "ddp 3, uneven": (3, spread("ddp")),
    "ddp 4": (4, spread("ddp")),
    "fsdp 2": (2, spread("fsdp")),
    "fsdp 3, uneven": (3, spread("fsdp")),
    "fsdp 4": (4, spread("fsdp")),
    "hsdp 2x2": (4, spread("hsdp", shard=2)),
}
MORE_CELLS = {
    "ddp 3, uneven, micro": (3, spread("ddp") | {"micro": 2}),
    "fsdp 2, micro": (2, spread("fsdp") | {"micro": 2}),
    "hsdp 2x2, micro": (4, spread("hsdp") | {"micro": 2, "machine": 2}),
    "one process, recompute": (1, spread("auto", recompute=True)),
    "ddp 2, recompute": (2, spread("ddp", recompute=True)),
    "fsdp 3, uneven, recompute, micro": (3, spread("fsdp", recompute=True) | {"micro": 2}),
    "one process, ddp": (1, spread("ddp")),
    "one process, fsdp": (1, spread("fsdp")),
}
COMPILED = {
    "one process": (1, {"compile": True}),
    "ddp 2": (2, spread("ddp") | {"compile": True}),
    "fsdp 2": (2, spread("fsdp") | {"compile": True}),
}
# Code for this CPU takes more than a minute a cell: by default they check what is traced, graph by
# graph, without it.
BACKENDS = [
    *((cell, "aot_eager") for cell in COMPILED),
    *(pytest.param(cell, "inductor", marks=pytest.mark.slow) for cell in COMPILED),
]


def check(bench: Bench, optimizer: str, size: int, changes: dict[str, Any]) -> None:
    ratios = bench.ratios(optimizer, size, **changes)
    print(f"{optimizer}: " + ", ".join(f"{kind} {ratios[kind]:.2f}" for kind in KINDS))
    assert max(ratios.values()) <= FACTOR, ratios


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cell", CELLS)
def test_strategies(bench: Bench, cell: str, optimizer: str) -> None:
    size, changes = CELLS[cell]
    check(bench, optimizer, size, changes)


@pytest.mark.parametrize("cell", MORE_CELLS)
def test_variations(bench: Bench, cell: str) -> None:
    size, changes = MORE_CELLS[cell]
    check(bench, "lars", size, changes)


@pytest.mark.parametrize(("cell", "backend"), BACKENDS)
def test_compiled(bench: Bench, cell: str, backend: str) -> None:
    size, changes = COMPILED[cell]
    check(bench, "sgd", size, changes | {"backend": backend})


def test_yardstick_is_not_slack(bench: Bench) -> None:
    """Float32 itself stays within rounding of float64."""
    for optimizer in OPTIMIZERS:
        for micro in (1, 2):
            _, single = bench.yardsticks(optimizer, micro)
            assert max(single.values()) < 2e-4, (optimizer, micro, single)


def test_ranks_agree_bit_for_bit(bench: Bench) -> None:
    """What every rank holds in full is the same everywhere, and ranks share out the batch."""
    outcomes = bench.run(3, **spread("ddp"))
    (single,) = bench.run(1)
    for kind in ("online", "target", "statistics"):
        for outcome in outcomes[1:]:
            for name, value in outcome.tensors[kind].items():
                assert torch.equal(value, outcomes[0].tensors[kind][name]), name
    assert [len(outcome.ids[0]) for outcome in outcomes] == [6, 6, 12]
    for step, ids in enumerate(single.ids):
        assert [i for outcome in outcomes for i in outcome.ids[step]] == ids


# Planted faults ---------------------------------------------------------------------------------


def gradient_times_world(trainer: Trainer) -> None:
    def scale(*_: object) -> None:
        gradients = [p.grad for p in trainer.online.parameters() if p.grad is not None]
        torch._foreach_mul_(local(gradients), trainer.world.size)

    trainer.optimizer.register_step_pre_hook(scale)


def unsynchronized_norm(trainer: Trainer) -> None:
    for module in [*trainer.online.modules(), *trainer.target.modules()]:
        if isinstance(module, BatchNorm):
            module.group = None


def average_before_step(trainer: Trainer) -> None:
    before: list[list[torch.Tensor]] = []

    def late(
        target: list[torch.Tensor], online: list[torch.Tensor], fraction: torch.Tensor
    ) -> None:
        update_target(target, before[-1] if before else online, fraction)
        before.append([p.detach().clone() for p in online])

    trainer.update_target = late


def swapped_stream(trainer: Trainer) -> None:
    """The last rank reads the first rank's stream in place of its own last one."""
    batches = trainer.batches

    def swapped() -> Any:
        found = batches()
        if trainer.world.rank == trainer.world.size - 1:
            streams: Any = [*found.assignment.streams[:-1], 0]
            found.assignment = found.assignment._replace(streams=streams)
        return found

    trainer.batches = swapped  # type: ignore[method-assign]


def mean_of_means(trainer: Trainer) -> None:
    """Every rank's mean counts alike, however many rows it has."""
    scaled, size = trainer.guard.scale_loss, trainer.world.size
    rows = trainer.batches().assignment.rows
    trainer.guard.scale_loss = lambda loss: scaled(  # type: ignore[method-assign]
        loss * trainer.recipe.batch.size / (rows * size)
    )


@pytest.mark.parametrize(
    ("fault", "optimizer"),
    [
        (gradient_times_world, "sgd"),
        (unsynchronized_norm, "lars"),
        (average_before_step, "lars"),
        (swapped_stream, "lars"),
        (mean_of_means, "sgd"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_planted_faults_fail(
    bench: Bench, fault: Callable[[Trainer], None], optimizer: str
) -> None:
    ratios = bench.ratios(optimizer, 3, fault=fault, **spread("ddp"))
    print({kind: f"{ratio:.3g}" for kind, ratio in ratios.items()})
    assert max(ratios.values()) > 100 * FACTOR
