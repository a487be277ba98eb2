"""Try on a GPU what no GPU has run: batches that are copied beside steps, and CUDA graphs.

    [TORCHINDUCTOR_CUDAGRAPHS=1] python -m tests.helpers.gpu_trials OUT RECIPE BATCH STEPS ROUNDS

With that variable, Inductor starts the kernels of each region as one graph. A step whose batch is
on the GPU already is beside one whose batch is copied beside the step before: what is between them
is what the copies still cost. The time in which the host starts a step's kernels is beside the time
of the whole step: where both are equal, the host decides the speed.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory

import torch

from engine.processes import world
from engine.recipe import load
from engine.trainer import Trainer
from launch.benchmarks.machine import read_head
from launch.benchmarks.measuring import CUDA, Cost, alternate, measure, repeat, wait
from launch.benchmarks.results import Report, Row, publish, speeds
from launch.benchmarks.step import SETTLING, prepare
from shards.loader import Batch
from shards.order import BatchConfig


def measure_trials(out: str, recipe: str, batch: int, steps: int, rounds: int) -> Report:
    """Measure steps of a recipe, in its precision, and compiled where there is a GPU."""
    config = replace(load(recipe), compile=CUDA, batch=BatchConfig(batch), threads=None)
    with TemporaryDirectory() as folder:
        trainer, copied = prepare(config, folder)
        moved = {
            name: getattr(copied, name).to(trainer.device) for name in ("views", "params", "labels")
        }
        resident = copied._replace(**moved)
        repeat(partial(_step, trainer, resident), 1 + SETTLING)
        sides: dict[str, Callable[[], Cost]] = {
            name: partial(_measure, trainer, data, steps)
            for name, data in (("resident", resident), ("copied", copied))
        }
        costs = alternate(sides, rounds)
        starts, wholes = zip(*(_time(trainer, resident) for _ in range(max(3, steps))), strict=True)
    world.leave()
    graphs = os.environ.get("TORCHINDUCTOR_CUDAGRAPHS") == "1"
    rows = speeds("step on a batch of the device", costs["resident"], costs["copied"], "copied")
    rows.append(Row("kernels started in", median(starts), "ms", median(wholes), "whole step"))
    command = f"python -m tests.helpers.gpu_trials OUT {recipe} {batch} {steps} {rounds}"
    rows = [replace(row, command=f"TORCHINDUCTOR_CUDAGRAPHS={graphs:d} {command}") for row in rows]
    title = f"trials: {recipe}, batch {batch}, {config.precision}, CUDA graphs {graphs}"
    return Report([title, f"medians of {rounds} rounds of {steps} steps"], rows, out)


def _step(trainer: Trainer, batch: Batch) -> None:
    trainer.step = 1  # each step has the rates of the first
    # All regions of a step belong together. Otherwise the next one writes where this one's
    # outputs are.
    torch.compiler.cudagraph_mark_step_begin()
    trainer.train_step(batch)


def _measure(trainer: Trainer, batch: Batch, steps: int) -> Cost:
    work = partial(_step, trainer, batch)
    return measure(lambda: repeat(work, steps), steps * trainer.recipe.batch.size)


def _time(trainer: Trainer, batch: Batch) -> tuple[float, float]:
    """Return the milliseconds until the host has started a step, and until the GPU has done it."""
    wait()
    begin = time.perf_counter()
    _step(trainer, batch)
    started = time.perf_counter()
    wait()
    return 1e3 * (started - begin), 1e3 * (time.perf_counter() - begin)


if __name__ == "__main__":
    head = read_head()
    out, recipe, *numbers = sys.argv[1:]
    batch, steps, rounds = map(int, numbers)
    publish(measure_trials(out, recipe, batch, steps, rounds), head, sys.argv[1:])
