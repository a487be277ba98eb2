"""Measure how far our training and lightly's come in equal time of the machine's cores."""

import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch

from engine.data import open_data
from engine.log.terminal import Terminal
from engine.method.schedule import learning_rate, tau
from engine.processes import world
from engine.recipe import Recipe, load
from engine.run import open_run
from engine.trainer import Trainer
from launch.benchmarks.input import read_contents
from launch.benchmarks.lightly_byol import (
    LightlyBYOL,
    check_installed,
    check_optimizer,
    load_views,
)
from launch.benchmarks.measuring import CUDA, alternate, measure, require_positive
from launch.benchmarks.results import Report, Row, check_out, ratio
from shards.errors import InputError

PILOT = 20  # steps that tell how many fit into the time, after as many that settle


class Training(NamedTuple):
    """What one training came to."""

    accuracy: float  # kNN top-1 in percent
    seconds: float  # of a core
    epochs: float


def bench_accuracy(
    *,
    recipe: str = "quickstart",
    core_seconds: float = 300.0,
    rounds: int = 3,
    threads: int = 1,
    precision: Literal["fp32", "bf16"] = "bf16" if CUDA else "fp32",
    out: str = "",
) -> Report:
    """Measure kNN accuracy after equal core-seconds, beside lightly.

    Each side trains the recipe's network on the recipe's images, with its optimizer and its
    schedule, which is stretched to as many steps as the side can take in the time. A few steps
    before tell how many these are. lightly's side is that of `peers`. Then the same kNN measures
    both encoders. A round has its own seed. Evaluations are not part of the time. Each training's
    accuracy is printed as soon as it is known.

    Args:
        recipe: Recipe file with data.train and data.val, and LARS or AdamW.
        core_seconds: CPU time of each training, with its loader, in all processes.
        rounds: Number of times that each side is trained.
        threads: Threads for torch on the CPU and for decoding, and worker processes for lightly.
        precision: Precision of the forward passes of both sides.
        out: File that the rows are also written to, as JSON.
    """
    check_out(out)
    require_positive(core_seconds=core_seconds, rounds=rounds, threads=threads)
    check_installed()
    base = load(recipe)
    check_optimizer(base)
    if not base.data.val:
        raise InputError(f"--recipe {recipe}: has no data.val, which kNN is measured on")
    config = replace(
        base,
        threads=threads,
        compile=False,
        precision=precision,
        batch=replace(base.batch, micro=1),
        probe=replace(base.probe, every=1, baseline=False),
        checkpoint=replace(base.checkpoint, resume=""),
    )
    with TemporaryDirectory() as folder:
        sides = _Sides(config, core_seconds, folder)
        found = alternate({"ours": sides.train_ours, "lightly": sides.train_lightly}, rounds)
    world.leave()
    title = [
        f"accuracy: {recipe}, {config.model.encoder.describe()}, {precision}, threads {threads}, "
        f"{core_seconds:g} core-seconds",
        f"medians of {rounds} trainings",
    ]
    return Report(title, _rows(found["ours"], found["lightly"]), out)


def _rows(ours: list[Training], lightly: list[Training]) -> list[Row]:
    (own, seconds, epochs), theirs = zip(*ours, strict=True), list(zip(*lightly, strict=True))
    spread = ratio(list(own), list(theirs[0]))
    return [
        Row("kNN top-1", median(own), "%", median(theirs[0]), "lightly", spread),
        Row("epochs", median(epochs), "", median(theirs[2]), "lightly"),
        Row("CPU time of the training", median(seconds), "core-s", median(theirs[1]), "lightly"),
    ]


class _Sides:
    """Both trainings. The constructor finds out how many steps each of them can take."""

    def __init__(self, recipe: Recipe, core_seconds: float, folder: str) -> None:
        self.world, self.terminal = world.join(recipe.threads, False), Terminal(main=False)
        self.recipe, self.folder = recipe, folder
        self.seeds = {"ours": count(recipe.seed), "lightly": count(recipe.seed)}
        trainer = self._build(replace(recipe, run=f"{folder}/pilot"))
        byol = LightlyBYOL(trainer.recipe, trainer.device)
        order = trainer.data.order
        self.contents = read_contents(order, order.steps_per_epoch)
        self.steps = {
            "ours": _count_steps(_steps_of_ours(trainer), core_seconds),
            "lightly": _count_steps(self._steps_of_lightly(byol, trainer), core_seconds),
        }

    def train_ours(self) -> Training:
        trainer = self._build(self._stretched("ours"))
        with closing(_steps_of_ours(trainer)) as training:
            seconds = measure(lambda: _take(training, self.steps["ours"]), 1).cpu
        return self._finish(trainer, seconds)

    def train_lightly(self) -> Training:
        trainer = self._build(self._stretched("lightly"))  # which lends its schedule and its kNN
        byol = LightlyBYOL(trainer.recipe, trainer.device)
        with closing(self._steps_of_lightly(byol, trainer)) as training:
            seconds = measure(lambda: _take(training, self.steps["lightly"]), 1).cpu
        trainer.online.encoder.stock_module().load_state_dict(byol.backbone.state_dict())
        return self._finish(trainer, seconds)

    def _stretched(self, side: str) -> Recipe:
        """Return the recipe of the side's next training, with a schedule of the side's steps."""
        recipe, steps = self.recipe, self.steps[side]
        seed, samples, batch = next(self.seeds[side]), len(self.contents), recipe.batch.size
        whole = recipe.schedule.total_steps(samples, batch)
        warmup = recipe.schedule.warmup_steps(samples, batch)
        schedule = replace(
            recipe.schedule,
            epochs=steps * batch / self.samples,
            warmup=steps * warmup // max(1, whole),
        )
        return replace(recipe, seed=seed, schedule=schedule, run=f"{self.folder}/{side}_{seed}")

    def _build(self, recipe: Recipe) -> Trainer:
        recipe.check()
        data = open_data(recipe, self.world, self.terminal.say)
        self.samples = data.train.samples
        run = open_run(recipe, data.train.digest, self.world, self.terminal)
        return Trainer(recipe, self.world, data, run)

    def _steps_of_lightly(self, byol: LightlyBYOL, trainer: Trainer) -> Generator[None]:
        """Take a step of lightly's each time that one is asked for, at the trainer's rates."""
        recipe, total = trainer.recipe, trainer.total_steps
        order: Any = _shuffle(len(self.contents), recipe.seed)
        with closing(
            load_views(self.contents, order, recipe, trainer.device, trainer.threads)
        ) as views:
            for step, (view1, view2) in enumerate(views):
                lr = learning_rate(step, trainer.peak_lr, trainer.warmup_steps, total)
                byol.step(view1, view2, lr, tau(step, recipe.schedule.base_tau, total))
                yield

    def _finish(self, trainer: Trainer, seconds: float) -> Training:
        assert trainer.probe is not None  # probe.every is not 0
        accuracy = 100 * trainer.probe.evaluate()["knn_top1"]
        epochs = trainer.recipe.schedule.epochs
        print(  # all rounds may take hours, and whoever ends them early keeps what is known
            f"  kNN top-1 {accuracy:.2f}% after {epochs:.2f} epochs in {seconds:.0f} core-seconds",
            file=sys.stderr,
        )
        return Training(accuracy, seconds, epochs)


def _steps_of_ours(trainer: Trainer) -> Generator[None]:
    """Take a step each time that one is asked for."""
    with closing(trainer.batches()) as batches:
        for batch in batches:
            trainer.train_step(batch)
            yield


def _count_steps(training: Generator[None], core_seconds: float) -> int:
    """Return how many steps fit into the time, by the cost of a few of them."""
    with closing(training):
        _take(training, PILOT)
        cost = measure(lambda: _take(training, PILOT), PILOT).cpu
    return max(1, round(core_seconds / cost))


def _take(training: Generator[None], steps: int) -> None:
    for _ in range(steps):
        next(training)


def _shuffle(count: int, seed: int) -> Iterator[int]:
    """Yield the places of all images in an order of its own for each epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
