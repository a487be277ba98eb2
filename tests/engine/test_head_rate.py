"""`probe.head_lr` moves the online head alone, however the work is spread, and after a resume."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.evaluation.during_training import ProbeConfig
from engine.method.adamw import AdamWConfig
from engine.method.lars import LARSConfig
from engine.processes.parallel import ParallelConfig
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import train
from tests.whole import parity

OPTIMIZERS = {"lars": LARSConfig(), "adamw": AdamWConfig()}


def outcome(ranks: Ranks, data: DataConfig, run: Path, head_lr: float | None, **more: Any) -> Any:
    size = more.pop("size", 1)
    config = parity.recipe(data, str(run), precision="fp64", **more)
    config = dataclasses.replace(config, probe=ProbeConfig(head_lr=head_lr))
    return ranks.run(parity.take_steps, config, size=size)[0].tensors["online"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_the_head_moves_at_its_rate(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path, optimizer: str
) -> None:
    method = {"optimizer": OPTIMIZERS[optimizer]}
    plain = outcome(ranks, tiny_data, tmp_path / "plain", None, **method)
    own = outcome(ranks, tiny_data, tmp_path / "own", 40.0, **method)
    for name, value in plain.items():
        assert torch.equal(value, own[name]) != name.startswith("classifier"), name
    for strategy in ("ddp", "fsdp"):
        spread: Any = {"parallel": ParallelConfig(strategy, timeout=60), "size": 2}
        found = outcome(ranks, tiny_data, tmp_path / strategy, 40.0, **spread, **method)
        # A bias before a norm has no gradient but rounding errors, which AdamW divides by their own
        # size plus 1e-8. So they move it by up to about 1e-8, in another way on each machine.
        for name, value in own.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_with_its_head(tiny_data: DataConfig, tmp_path: Path, optimizer: str) -> None:
    probe = ProbeConfig(every=5, neighbours=5, head_lr=40.0)
    method = {"optimizer": OPTIMIZERS[optimizer], "probe": probe}
    train(tiny.recipe(tiny_data, tmp_path / "whole", steps=9, **method))
    train(tiny.recipe(tiny_data, tmp_path / "parts", steps=6, **method))
    train(tiny.recipe(tiny_data, tmp_path / "parts", steps=9, **method))
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    losses = [[record["head_loss"] for record in records] for records in lines]
    assert losses[0] == losses[1]
