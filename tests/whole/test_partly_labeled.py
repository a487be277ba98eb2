"""A partly labeled set: every strategy computes the same mean over the rows that have a label."""

import copy
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.measuring import describe_step
from engine.trainer import Trainer
from shards.loader import DataConfig
from shards.order import BatchConfig
from tests.helpers import tiny
from tests.helpers.labels import draw_some
from tests.helpers.ranks import Ranks
from tests.helpers.training import open_trainer
from tests.whole.test_parity import FACTOR, Bench, spread

pytestmark = pytest.mark.versions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Every fifth image has a label: a batch of 24 rows has about 5, unevenly over the ranks."""
    folder = tmp_path_factory.mktemp("partly") / "train"
    draw_some(folder, tiny.SAMPLES, lambda i: i % 5 == 0)
    return DataConfig(train=str(folder), streams=4)


@pytest.fixture(scope="module")
def bench(ranks: Ranks, data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(ranks, data, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("micro", [1, 2])
def test_the_mean_is_over_labeled_rows(data: DataConfig, tmp_path: Path, micro: int) -> None:
    config = tiny.recipe(
        data, tmp_path, precision="fp64", batch=BatchConfig(16, micro), probe=tiny.NO_PROBE
    )
    trainer = open_trainer(config)
    with closing(trainer.batches()) as batches:
        batch = next(batches)
    there = batch.labels >= 0
    assert 0 < there.sum() < 16
    twin, seen = copy.deepcopy(trainer.online), list[Tensor]()

    def keep(*_: object) -> None:
        weight = next(iter(trainer.online.classifier.parameters()))  # type: ignore[union-attr]
        assert weight.grad is not None
        seen.append(weight.grad.clone())

    trainer.optimizer.register_step_pre_hook(keep)
    parts = trainer._micro_batches(*trainer.copies.take(batch.views, batch.params, batch.labels))
    output = trainer.train_step(batch)
    logits = torch.cat([twin(trainer.augment(views, params)).logits for views, params, _ in parts])
    expected = nn.functional.cross_entropy(logits[there], batch.labels[there])
    expected.backward()
    torch.testing.assert_close(output.head_loss, expected.detach(), rtol=1e-12, atol=0)
    weight = next(iter(twin.classifier.parameters()))  # type: ignore[union-attr]
    torch.testing.assert_close(seen[0], weight.grad, rtol=1e-10, atol=1e-14)


def own_rows_only(trainer: Trainer) -> None:
    """A planted fault: each process divides by its own number of labeled rows."""

    def count(labels: Tensor) -> Tensor:
        return (labels >= 0).sum()

    trainer._count_labels = count  # type: ignore[method-assign]


CELLS = {
    "ddp 2": (2, spread("ddp")),
    "ddp 3, uneven": (3, spread("ddp")),
    "ddp 2, micro": (2, spread("ddp") | {"micro": 2}),
    "fsdp 2": (2, spread("fsdp")),
}


@pytest.mark.parametrize("cell", CELLS)
def test_strategies(bench: Bench, cell: str) -> None:
    size, changes = CELLS[cell]
    ratios = bench.ratios("sgd", size, **changes)
    assert max(ratios.values()) <= FACTOR, ratios


def test_a_count_of_ones_own_is_found(bench: Bench) -> None:
    changes: dict[str, Any] = spread("ddp") | {"fault": own_rows_only}
    assert bench.ratios("sgd", 2, **changes)["first gradient"] > 100


def test_a_batch_without_labels_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    draw_some(folder, tiny.SAMPLES, lambda i: i == 0)
    few = DataConfig(train=str(folder), streams=4)
    trainer = open_trainer(tiny.recipe(few, tmp_path / "run", probe=tiny.NO_PROBE))
    found = []
    with closing(trainer.batches()) as batches:
        for _ in range(tiny.SAMPLES // 16):
            batch = next(batches)
            output = trainer.train_step(batch)
            found.append(describe_step(trainer, output, batch)["head_loss"])
    assert found.count(None) >= len(found) - 1
    assert all(value is None or value > 0 for value in found)
