"""The loop of the evaluations that learn from labels."""

from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.evaluation.session import Evaluation
from engine.evaluation.supervised import Examples, train
from engine.log.terminal import Terminal
from engine.processes.world import World
from shards.blocks import checksum
from shards.index import Index, Shard

STEPS = 40


class Counting:
    """A training that only counts its steps."""

    total_steps = STEPS

    def __init__(self) -> None:
        self.step = 0

    def in_hand(self) -> str:
        return "lr 0.1"

    def train_step(self, _: Examples) -> Tensor:
        self.step += 1
        return torch.zeros(1)

    def state(self) -> dict[str, Any]:
        return {"weight": torch.full((3,), float(self.step))}


class Part:
    """As much of an evaluation as the loop needs."""

    def __init__(self, url: str, index: Index) -> None:
        self.url, self.train, self.terminal = url, index, Terminal(main=False)
        self.world = World(0, 1, 1, torch.device("cpu"))


def batches(start: int) -> Generator[Examples, None, None]:
    for _ in range(start, STEPS):
        yield Examples(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), 1)


def test_a_step_does_not_look_at_all_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest of a set of 25,000 shards takes 65 ms, which is more than a step on features."""
    blocks = np.array([[0, 8]], np.int64)
    index = Index("memory://none", [Shard("0.tar", 8, 8192, blocks, checksum(blocks))])
    asked: list[int] = []
    training, find = Counting(), Index.compute_digest

    def count(index: Index, classes: list[str]) -> str:
        asked.append(training.step)
        return find(index, classes)

    monkeypatch.setattr(Index, "compute_digest", count)
    evaluation = cast(Evaluation, Part(str(tmp_path), index))
    assert train(training, batches, evaluation, save_every=10)
    assert training.step == STEPS
    assert asked == [0]
