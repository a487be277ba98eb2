"""Runs of several processes: what they agree on, save, measure, and how they fail."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.evaluation.during_training import ProbeConfig
from engine.log.metrics import TIMINGS
from engine.method.local_shards import local
from engine.method.precision import FIRST_SCALE
from engine.processes import parallel, world
from engine.processes.parallel import ParallelConfig
from engine.recipe import Recipe
from engine.state.checkpoint import CheckpointConfig
from shards.errors import InputError
from shards.loader import DataConfig
from tests.helpers.places import ROOT
from tests.helpers.ranks import RankFailure, Ranks
from tests.helpers.training import finish, open_trainer, training
from tests.whole import parity
from tests.whole.parity import SGDConfig

pytestmark = pytest.mark.versions

QUICKSTART = str(ROOT / "recipes" / "quickstart.py")


def train(recipe: Recipe) -> int:
    """On a rank: train to the recipe's last step."""
    with training(recipe) as trainer:
        finish(trainer)
        return trainer.step


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def recipe(data: DataConfig, run: Path, strategy: Any = "auto", **changes: Any) -> Recipe:
    changes = {"checkpoint": CheckpointConfig(every=3)} | changes
    spread = ParallelConfig(strategy=strategy, timeout=60)
    return parity.recipe(data, str(run), optimizer=SGDConfig(), parallel=spread, **changes)


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of one process."""
    run = tmp_path_factory.mktemp("alone")
    ranks.run(train, recipe(tiny_data, run, steps=6), size=1)
    return run


@pytest.mark.parametrize(
    ("strategy", "first", "then"),
    [("fsdp", 4, [("auto", 1), ("ddp", 2), ("fsdp", 3)]), ("ddp", 2, [("fsdp", 4)])],
)
def test_any_world_size_goes_on_from_any_other(
    ranks: Ranks,
    tiny_data: DataConfig,
    tmp_path: Path,
    alone: Path,
    strategy: str,
    first: int,
    then: list[tuple[str, int]],
) -> None:
    run = tmp_path / "first"
    ranks.run(train, recipe(tiny_data, run, strategy, steps=3), size=first)
    for number, (other, size) in enumerate(then):
        copy = CheckpointConfig(every=3, resume=str(run))
        second = tmp_path / f"second{number}"
        config = recipe(tiny_data, second, other, steps=6, checkpoint=copy)
        assert ranks.run(train, config, size=size) == [6] * size
        records = lines(run) + lines(second)
        for record, expected in zip(records, lines(alone), strict=True):
            for key in ("step", "epoch", "lr", "tau", "data_digest", "skipped"):
                assert record[key] == expected[key]
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-3)
            assert record["feature_std"] == pytest.approx(expected["feature_std"], rel=1e-3)


@pytest.mark.parametrize("micro", [1, 2])
def test_three_processes_go_on_bit_for_bit(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path, micro: int
) -> None:
    """Sums of three numbers depend on their order, and it must not depend on where a start is."""
    for run, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            config = recipe(tiny_data, tmp_path / run, "ddp", steps=steps, micro=micro)
            config = dataclasses.replace(config, precision="fp32")
            ranks.run(train, config, size=3)
    untimed = [
        [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines(tmp_path / run)]
        for run in ("whole", "parts")
    ]
    assert untimed[0] == untimed[1]


def measure(config: Recipe) -> dict[str, float]:
    """On a rank: what evaluations say of the untrained networks."""
    config = dataclasses.replace(config, probe=ProbeConfig(every=5, neighbours=5))
    probe = open_trainer(config).probe
    assert probe is not None
    return probe.evaluate() | {"pixels": probe.measure_pixels()}


def test_evaluations_do_not_depend_on_the_world_size(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path
) -> None:
    (expected,) = ranks.run(measure, recipe(tiny_data, tmp_path / "1"), size=1)
    for strategy, size in (("ddp", 2), ("fsdp", 3)):
        config = recipe(tiny_data, tmp_path / strategy, strategy)
        for found in ranks.run(measure, config, size=size):
            assert found == pytest.approx(expected, rel=1e-5)


def test_more_ranks_than_streams(ranks: Ranks, tiny_data: DataConfig, tmp_path: Path) -> None:
    few = dataclasses.replace(tiny_data, streams=2)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train, recipe(few, tmp_path), size=3)
    assert str(failure.value).count("3 processes but data.streams is 2: start at most 2") == 3


def start_differently(first: Recipe, other: Recipe) -> int:
    """On a rank: train; the last rank was started with another recipe."""
    return train(first if os.environ["RANK"] == "0" else other)


def test_processes_of_different_runs_are_refused(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path
) -> None:
    first = recipe(tiny_data, tmp_path / "run", steps=1)
    for other, text in (
        (dataclasses.replace(first, seed=5), "seed: there 5, here 0"),
        (dataclasses.replace(first, steps=2), "steps: there 2, here 1"),
        (
            dataclasses.replace(first, data=dataclasses.replace(tiny_data, train=tiny_data.val)),
            "digest of data.train: there",
        ),
        (
            dataclasses.replace(first, data=dataclasses.replace(tiny_data, val="")),
            "data.val is set: there False, here True",
        ),
    ):
        with pytest.raises(RankFailure) as failure:
            ranks.run(start_differently, first, other, size=2)
        assert str(failure.value).count(text) == 2
    threads = dataclasses.replace(first, threads=2)  # a machine's own
    assert ranks.run(start_differently, first, threads, size=2) == [1, 1]


@pytest.mark.parametrize(
    ("size", "shard", "mend"),
    [(3, 2, "--parallel.strategy fsdp"), (4, 4, "--parallel.shard 2"), (4, 3, "--parallel.shard")],
)
def test_hsdp_needs_replicas(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path, size: int, shard: int, mend: str
) -> None:
    config = recipe(tiny_data, tmp_path)
    config = dataclasses.replace(config, parallel=ParallelConfig("hsdp", shard=shard))
    with pytest.raises(RankFailure, match=f"parallel.strategy hsdp: {size} processes .*{mend}"):
        ranks.run(train, config, size=size)
    assert not (tmp_path / "recipe.json").exists()


def test_hsdp_alone_is_refused(tiny_data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"use --parallel\.strategy fsdp"):
        open_trainer(recipe(tiny_data, tmp_path, "hsdp"))
    torch.distributed.destroy_process_group()


def choose_on_uneven_machines() -> tuple[str, str]:
    """On a rank: the strategy of a machine that has another number of GPUs, of another size."""
    there = world.join(1, distributed=True)
    there = dataclasses.replace(there, local_size=1 + there.rank, device=torch.device("cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "_memory", lambda _: (1 + there.rank) * 2**30)
        chosen = parallel.choose(ParallelConfig(), there, 2**30, lambda _: None)
        with pytest.raises(InputError) as error:
            parallel.choose(ParallelConfig("hsdp"), there, 0, print)
    return chosen, str(error.value)


def test_uneven_machines_choose_one_strategy(ranks: Ranks) -> None:
    for chosen, error in ranks.run(choose_on_uneven_machines, size=2):
        assert chosen == "fsdp"
        assert error.endswith("different numbers of processes: give --parallel.shard")


# Steps that are skipped -------------------------------------------------------------------------


def skip_a_step(config: Recipe, where: str) -> tuple[float, bool, float]:
    """On a rank: one step that only rank 1 finds not finite.

    Returns the loss scale's factor, whether the rank's parameters stayed, and the steps skipped.
    """
    trainer = open_trainer(config)
    trainer.step = 2
    scale = trainer.guard.scale
    assert scale is not None
    scale.fill_(1024)
    before = [p.detach().clone() for p in local(trainer.online.parameters())]
    if trainer.world.rank == 1 and where == "loss":
        trainer.guard.scale_loss = lambda loss: loss * math.inf  # type: ignore[method-assign]

    def spoil(*_: object) -> None:
        gradients = [p.grad for p in trainer.online.parameters() if p.grad is not None]
        if trainer.world.rank == 1 and where == "shard":
            next(g for g in local(gradients) if g.numel()).fill_(math.nan)

    trainer.optimizer.register_step_pre_hook(spoil)
    with closing(trainer.batches()) as batches:
        trainer.train_step(next(batches))
    after = local(trainer.online.parameters())
    same = all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    return scale.item() / 1024, same, trainer.guard.skipped.item()


@pytest.mark.parametrize(
    ("strategy", "where", "skipped"),
    [("ddp", "loss", 1), ("fsdp", "loss", 1), ("fsdp", "shard", 1), ("fsdp", "nowhere", 0)],
)
def test_ranks_agree_to_skip(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path, strategy: str, where: str, skipped: int
) -> None:
    config = recipe(tiny_data, tmp_path, strategy, precision="fp16")
    factor = 0.5 if skipped else 1.0
    expected = [(factor, bool(skipped), skipped)] * 2
    assert ranks.run(skip_a_step, config, where, size=2) == expected


# torchrun ---------------------------------------------------------------------------------------


def torchrun(size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "launch" / "train.py"), QUICKSTART, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def common(data: DataConfig, run: Path) -> list[str]:
    return [
        *("--data.train", data.train, "--data.val", data.val, "--run-url", str(run)),
        *("--batch.size", "16", "--data.streams", "4", "--threads", "1"),
    ]


@pytest.mark.slow
def test_torchrun_trains(tiny_data: DataConfig, tmp_path: Path) -> None:
    arguments = [*common(tiny_data, tmp_path), "--log.every", "1", "--precision", "fp16"]
    done = torchrun(2, *arguments, "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 of 91 steps done") == 1  # by one process
    assert "strategy ddp" in done.stdout
    assert [record["step"] for record in lines(tmp_path)] == [1, 2]
    last = lines(tmp_path)[-1]
    assert last["loss_scale"] == FIRST_SCALE * 16 / 2 ** last["skipped"]


def errors_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_mistakes_are_told_once(tiny_data: DataConfig, tmp_path: Path) -> None:
    done = torchrun(2, *common(tiny_data, tmp_path), "--batch.micro", "16")
    assert done.returncode == 1
    (line,) = errors_of(done)
    assert "batch.micro must be from 1 to 8, not 16" in line
    assert "Traceback (most recent call last)" not in done.stderr.split("torch/distributed")[0]


def test_a_fault_of_one_rank_is_told_by_that_rank(tiny_data: DataConfig, tmp_path: Path) -> None:
    """A shard that one rank reads goes away during the run: nobody hangs, one line says why."""
    from shards.making import synthetic

    synthetic.write(f"{tmp_path}/train", 64, 32, seed=0)
    index = json.loads((tmp_path / "train" / "index.json").read_text())
    shard = tmp_path / "train" / index["shards"][0]["name"]
    content = bytearray(shard.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    shard.write_bytes(content)
    data = DataConfig(train=f"{tmp_path}/train", val=tiny_data.val)
    done = torchrun(2, *common(data, tmp_path / "run"), "--probe.every", "0", "--probe.no-baseline")
    assert done.returncode != 0
    (line,) = errors_of(done)
    assert shard.name in line
    assert "Connection" not in done.stderr
