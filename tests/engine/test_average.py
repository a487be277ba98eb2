"""The average of the online encoder: its arithmetic, what survives, and what is made of it."""

import dataclasses
import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engine.encoder.source import EncoderConfig, open_encoder
from engine.method.average import AverageConfig
from engine.method.byol import update_target
from engine.method.local_shards import whole
from engine.processes.parallel import ParallelConfig, state_bytes
from engine.processes.world import World
from engine.recipe import Recipe
from engine.state.checkpoint import CheckpointConfig
from engine.trainer import Trainer
from launch import export
from shards.errors import InputError
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, open_trainer, training
from tests.whole import parity

ALONE = World(0, 1, 1, torch.device("cpu"))
RATE = 0.75
States = list[dict[str, Tensor]]


def recipe(data: DataConfig, run: Path | str, rate: float = RATE, **changes: Any) -> Recipe:
    given = {
        "average": AverageConfig(rate=rate),
        "probe": tiny.NO_PROBE,
        "checkpoint": CheckpointConfig(every=0),
    }
    return tiny.recipe(data, run, **given | changes)


def average_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copy the whole average, by the names of the encoder."""
    found = trainer.average.state()["average"]
    return {name.removeprefix("encoder."): whole(t).clone() for name, t in found.items()}


def encoder_of(trainer: Trainer) -> dict[str, Tensor]:
    return {n: whole(t).clone() for n, t in trainer.online.encoder.state_dict().items()}


def take_steps(config: Recipe, steps: int = 4, poisoned: int = 0) -> tuple[States, States]:
    """Take steps, the one of number `poisoned` with a gradient that is not finite.

    Returns the online encoders before the first step and after each one, and the averages.
    """
    trainer = open_trainer(config)
    next(trainer.online.parameters()).register_hook(
        lambda grad: grad * math.nan if trainer.step + 1 == poisoned else grad
    )
    online, averages = [encoder_of(trainer)], [average_of(trainer)]
    with closing(trainer.batches()) as batches:
        for _ in range(steps):
            trainer.train_step(next(batches))
            online.append(encoder_of(trainer))
            averages.append(average_of(trainer))
    return online, averages


def follow(config: Recipe, online: States) -> States:
    """Average the encoders by torch in float64, from the first one on."""
    network = config.model.encoder.build(1, config.views.size).double()
    network.load_state_dict(online[0])
    average = AveragedModel(
        network, multi_avg_fn=get_ema_multi_avg_fn(config.average.rate), use_buffers=True
    )
    average.update_parameters(network)  # the first call copies
    found = [{n: t.clone() for n, t in average.module.state_dict().items()}]
    for state in online[1:]:
        network.load_state_dict(state)
        average.update_parameters(network)
        found.append({n: t.clone() for n, t in average.module.state_dict().items()})
    return found


def distance(found: States, expected: States) -> float:
    """Return the largest relative difference of two series of averages, without counters."""
    assert len(found) == len(expected)
    largest = 0.0
    for ours, other in zip(found, expected, strict=True):
        assert ours.keys() == other.keys()
        for name in ours:
            if "num_batches" not in name:
                theirs = other[name].double()
                gap = (ours[name].double() - theirs).norm() / theirs.norm().clamp(min=1e-30)
                largest = max(largest, gap.item())
    return largest


def test_it_is_torchs_average(tiny_data: DataConfig, tmp_path: Path) -> None:
    config = recipe(tiny_data, tmp_path, precision="fp64")
    online, averages = take_steps(config)
    assert distance(averages, follow(config, online)) < 1e-13
    for ours, encoder in zip(averages, online, strict=True):
        assert ours.keys() == encoder.keys()
        assert torch.equal(ours["bn1.num_batches_tracked"], encoder["bn1.num_batches_tracked"])
    other = dataclasses.replace(config, average=AverageConfig(rate=RATE - 0.01))
    assert distance(averages, follow(other, online)) > 1e-6


@pytest.mark.parametrize("rate", [0.99, 0.9999, 0.99999])
def test_what_float32_leaves_out_is_told(rate: float) -> None:
    """A weight near 2, where rounding is finest, follows a difference of half of it nowhere."""
    config = AverageConfig(rate=rate)
    lost = torch.finfo(torch.float32).eps / 2 / (1 - rate)
    own, fraction = torch.full((1,), 1.999), torch.tensor(1 - rate)
    for part, moves in ((0.45 * lost, False), (1.1 * lost, True)):
        moved = own.clone()
        update_target([moved], [own * (1 + part)], fraction)
        assert torch.equal(moved, own) != moves
    assert bool(config.warn(torch.float32)) == (rate == 0.99999)
    assert not config.warn(torch.float64)
    assert not AverageConfig().warn(torch.float32)


def test_a_skipped_step_moves_nothing(tiny_data: DataConfig, tmp_path: Path) -> None:
    config = recipe(tiny_data, tmp_path, precision="fp64")
    online, averages = take_steps(config, poisoned=3)
    assert all(torch.equal(averages[3][name], averages[2][name]) for name in averages[3])
    kept = [state for number, state in enumerate(online) if number != 3]
    assert distance(averages[:3] + averages[4:], follow(config, kept)) < 1e-13


def on_ranks(config: Recipe, steps: int) -> dict[str, Any]:
    """On a rank: the last average of some steps."""
    return {name: t.numpy() for name, t in take_steps(config, steps)[1][-1].items()}


@pytest.mark.parametrize(("strategy", "micro"), [("ddp", 1), ("fsdp", 2)])
def test_on_two_processes(
    strategy: Any, micro: int, ranks: Ranks, tiny_data: DataConfig, tmp_path: Path
) -> None:
    average = AverageConfig(rate=RATE)
    alone = parity.recipe(tiny_data, str(tmp_path / "a"), precision="fp64", average=average)
    alone = dataclasses.replace(alone, batch=dataclasses.replace(alone.batch, micro=micro))
    spread = ParallelConfig(strategy=strategy, timeout=60)
    config = dataclasses.replace(alone, run=str(tmp_path / "b"), parallel=spread)
    expected = take_steps(alone, 3)[1][-1]
    for found in ranks.run(on_ranks, config, 3, size=2):
        there = {name: torch.as_tensor(value) for name, value in found.items()}
        assert distance([there], [expected]) < 1e-6


def finish_on_ranks(config: Recipe) -> dict[str, Any]:
    with training(config) as trainer:
        finish(trainer)
        return {name: t.numpy() for name, t in average_of(trainer).items()}


def train(config: Recipe) -> Trainer:
    with training(config) as trainer:
        finish(trainer)
    return trainer


def same(ours: dict[str, Tensor], other: dict[str, Any]) -> bool:
    assert ours.keys() == other.keys()
    return all(torch.equal(ours[name], torch.as_tensor(other[name])) for name in ours)


def test_it_survives_a_stop_bit_for_bit(tiny_data: DataConfig, tmp_path: Path) -> None:
    whole_run = average_of(train(recipe(tiny_data, tmp_path / "whole", steps=6)))
    train(recipe(tiny_data, tmp_path / "parts", steps=3))
    assert same(average_of(train(recipe(tiny_data, tmp_path / "parts", steps=6))), whole_run)
    with pytest.raises(InputError, match=r"average.rate: there 0.75, here 0.5"):
        train(recipe(tiny_data, tmp_path / "parts", 0.5, steps=6))


def test_it_survives_another_number_of_processes(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path
) -> None:
    config = parity.recipe(
        *(tiny_data, str(tmp_path)), average=AverageConfig(rate=RATE), checkpoint=CheckpointConfig()
    )
    spread = ParallelConfig(strategy="fsdp", timeout=60)
    there = ranks.run(
        finish_on_ranks, dataclasses.replace(config, parallel=spread, steps=3), size=2
    )
    alone = open_trainer(config)
    assert alone.step == 3
    assert same(average_of(alone), there[0])
    assert same(average_of(alone), there[1])


def begin_on_ranks(config: Recipe) -> bool:
    """On a rank: whether the average of a new run is the encoder that it begins with."""
    trainer = open_trainer(config)
    return same(average_of(trainer), encoder_of(trainer))


def test_a_branch_of_two_processes(ranks: Ranks, tiny_data: DataConfig, tmp_path: Path) -> None:
    parent = parity.recipe(tiny_data, str(tmp_path / "parent"), steps=1)
    train(parent)
    config = dataclasses.replace(
        parent,
        run=str(tmp_path / "run"),
        average=AverageConfig(rate=RATE),
        checkpoint=CheckpointConfig(branch=parent.run),
        parallel=ParallelConfig(strategy="fsdp", timeout=60),
    )
    assert ranks.run(begin_on_ranks, config, size=2) == [True, True]


def test_without_a_rate_nothing_is_kept(tiny_data: DataConfig, tmp_path: Path) -> None:
    trainer = open_trainer(recipe(tiny_data, tmp_path, 0.0))
    assert "average" not in trainer.state()
    moves: list[int] = []
    trainer.average._move = lambda own, *_: moves.append(len(own))
    trainer.train_step(next(trainer.batches()))
    assert not moves


def test_a_branch(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes its parent's average along, and else begins with the parent's online weights."""
    kept = train(recipe(tiny_data, tmp_path / "kept", steps=2))
    plain = train(recipe(tiny_data, tmp_path / "plain", 0.0, steps=2))
    capsys.readouterr()

    def branch(name: str, rate: float) -> Trainer:
        checkpoint = CheckpointConfig(every=0, branch=str(tmp_path / name))
        return open_trainer(recipe(tiny_data, tmp_path / "run", rate, checkpoint=checkpoint))

    begun = branch("plain", 0.5)
    assert same(average_of(begun), encoder_of(plain))
    assert "the average of the encoder begins" in capsys.readouterr().out.replace("\n", " ")
    assert same(average_of(branch("kept", 0.5)), average_of(kept))
    assert not same(average_of(kept), encoder_of(kept))
    assert "average" not in branch("kept", 0.0).state()


def test_weights_to_start_from_are_where_it_begins(tiny_data: DataConfig, tmp_path: Path) -> None:
    there = train(recipe(tiny_data, tmp_path / "kept", steps=2))
    config = recipe(tiny_data, tmp_path / "run")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, start=str(tmp_path / "kept"))
    )
    assert same(average_of(open_trainer(config)), encoder_of(there))


def test_it_is_opened_and_exported(tiny_data: DataConfig, tmp_path: Path) -> None:
    run, out = str(tmp_path / "run"), tmp_path / "out"
    expected = average_of(train(recipe(tiny_data, run, steps=3)))
    source, encoder = open_encoder(run, EncoderConfig(network="average"), ALONE, print)
    assert same(encoder.state_dict(), expected)
    assert source.report.startswith("average network of")
    arguments = ["--network", "average", "--format", "safetensors", "--threads", "1"]
    assert export.main([run, str(out), *arguments]) == 0
    assert same(safetensors.torch.load_file(out / "encoder.safetensors"), expected)
    assert json.loads((out / "card.json").read_text())["network"] == "average"

    train(recipe(tiny_data, tmp_path / "plain", 0.0, steps=1))
    told = r"--network average: .*step_00000001 has no average, .*give --network online or target$"
    with pytest.raises(InputError, match=told):
        open_encoder(str(tmp_path / "plain"), EncoderConfig(network="average"), ALONE, print)


def test_compiled(tiny_data: DataConfig, tmp_path: Path) -> None:
    """As the trainer compiles it, beside the target's average, which has other tensors."""
    trainer = open_trainer(recipe(tiny_data, tmp_path, precision="fp64"))
    before, online = average_of(trainer), encoder_of(trainer)
    trainer.average._move = torch.compile(update_target, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for parameter in trainer.online.encoder.parameters():
            parameter.add_(1.0)
    trainer.average.follow(torch.zeros(()))
    after = average_of(trainer)
    for name, parameter in trainer.online.encoder.named_parameters():
        moved = before[name] + (1 - RATE) * (online[name] + 1 - before[name])
        torch.testing.assert_close(after[name], moved, rtol=1e-12, atol=1e-12)
        assert parameter.requires_grad


def test_its_bytes_count(tiny_data: DataConfig, tmp_path: Path) -> None:
    trainer = open_trainer(recipe(tiny_data, tmp_path))
    encoder = sum(p.nbytes for p in trainer.online.encoder.parameters())
    without = state_bytes(trainer.online, trainer.target, 1)
    assert state_bytes(trainer.online, trainer.target, 1, averages=True) == without + encoder
