"""Random combinations of fields: --explain accepts what a start does, and a stop changes nothing.

Single fields have tests of their own. These look at what fields do to each other.
"""

import json
import random
from pathlib import Path

import pytest

from engine.processes import world
from launch import train
from shards.loader import DataConfig
from tests.engine.test_trainer import comparable

# Each combination takes one of these of each row; "" leaves the field as the recipe has it.
CHOICES = (
    ("--batch.micro 2", "--batch.micro 4", ""),
    ("--precision fp64", "--precision fp16", "--precision bf16", ""),
    ("--average.rate 0.9", ""),
    ("--clip.norm 0.1", "--clip.value 1e-4", ""),
    ("--probe.every 2", "--probe.every 1 --checkpoint.keep-best knn_top1", "--probe.every 0"),
    ("--early-stop.key loss --early-stop.patience 1", ""),
    ("--checkpoint.every 1 --checkpoint.keep 1", "--checkpoint.no-background", ""),
    ("--probe.head-lr 10", "--probe.no-baseline", ""),
    ("--parallel.recompute", "--parallel.strategy fsdp", "--parallel.strategy hsdp", ""),
    ("--data.audit", "--data.corrupt 0", "--data.exif apply", ""),
    ("--schedule.tau-rule power", "--schedule.lr-decay none", "--schedule.rewarm 1", ""),
    ("--parallel.shard 2", "", "", ""),
)


def draw(seed: int, data: DataConfig) -> list[str]:
    chance = random.Random(seed)
    sets = f"--data.train {data.train} --data.val {data.val} --data.draw 0 --data.streams 4"
    sizes = "--batch.size 16 --model.encoder.width 0.0625 --model.hidden 8 --model.projection 8"
    rest = "--views.size 16 --schedule.epochs 0.62 --schedule.warmup 1 --threads 1 --log.every 1"
    chosen = [word for row in CHOICES for word in chance.choice(row).split()]
    return ["quickstart", *sets.split(), *sizes.split(), *rest.split(), *chosen]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 6, 7])
def test_a_combination_of_fields(
    seed: int, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = draw(seed, tiny_data)

    def start(name: str, *more: str) -> str:
        """Return "" when the start ends well, and otherwise its error."""
        status = train.main([*command, "--run-url", str(tmp_path / name), *more])
        world.leave()
        told = capsys.readouterr().err
        assert status == 0 or (status == 1 and told.startswith("error: ") and told.count("\n") == 1)
        return told if status else ""

    explained = start("whole", "--explain")
    assert not (tmp_path / "whole").exists()
    started = start("whole")
    assert bool(started) == bool(explained), started + explained  # of two faults, either is told
    if started:
        return
    assert start("stopped", "--steps", "2") == start("stopped") == ""
    assert comparable(tmp_path / "stopped") == comparable(tmp_path / "whole")
    assert start("whole", "--replay", "2") == ""
    summary = json.loads((tmp_path / "whole/replay/step_00000002/summary.json").read_text())
    assert summary["replayed"]["loss"] == summary["logged"]["loss"]
