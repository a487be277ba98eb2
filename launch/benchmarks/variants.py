"""Measure choices of the step beside their alternatives, and the largest batch that fits."""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from engine.method.byol import VIEWS
from engine.method.norm import BatchNorm
from engine.method.precision import autocast
from engine.processes import world
from engine.processes.parallel import ParallelConfig
from engine.recipe import Recipe, load
from engine.trainer import Trainer
from launch.benchmarks.measuring import (
    CUDA,
    Cost,
    alternate,
    device_name,
    measure,
    repeat,
    require_positive,
    wait,
)
from launch.benchmarks.results import Report, Row, check_out, speeds
from launch.benchmarks.step import default_recipe, empty_caches, prepare
from shards.errors import InputError
from shards.loader import Batch
from shards.order import BatchConfig

Precision = Literal["fp32", "bf16", "fp16"]
PRECISION: Precision = "bf16" if CUDA else "fp32"
SPREADS = {
    "plain": ParallelConfig(),
    "recomputed": ParallelConfig(recompute=True),
    "fsdp": ParallelConfig("fsdp"),
}
FIRST = 8  # images of the smallest batch that is tried


def bench_variants(
    *,
    recipe: str = "",
    batch: int | None = None,
    steps: int = 10,
    rounds: int = 5,
    threads: int | None = None,
    precision: Precision = PRECISION,
    compile: bool = CUDA,
    fresh: bool = True,
    out: str = "",
) -> Report:
    """Measure one forward for both views beside two, and channels_last beside contiguous images.

    Each side is the forward and the backward pass of the online network, on the same images. Ours
    is one forward on images in channels_last.

    Args:
        recipe: Recipe file whose networks and views are used. By default it is that of `step`.
        batch: Images in a batch, in place of the recipe's.
        steps: Steps in a round.
        rounds: Number of times that each side is measured.
        threads: Threads for torch on the CPU. By default they are the cores that the job may use.
        precision: Precision of the forward passes.
        compile: Compile the network.
        fresh: Compile with empty caches, which takes minutes for a ResNet-50 on a GPU. --no-fresh
            takes what was compiled on this machine before.
        out: File that the rows are also written to, as JSON.
    """
    check_out(out)
    base = load(recipe) if recipe else default_recipe()
    batch = base.batch.size if batch is None else batch
    require_positive(batch=batch, steps=steps, rounds=rounds)
    config = replace(
        base, threads=threads, compile=compile, precision=precision, batch=BatchConfig(batch)
    )
    with TemporaryDirectory() as folder, empty_caches(compile and fresh):
        trainer, data = prepare(config, folder)
        views, params = (t.flatten(0, 1).to(trainer.device) for t in (data.views, data.params))
        images = trainer.augment(views, params)
        sides: dict[str, Callable[[], Cost]] = {
            name: partial(_measure, trainer, given, passes, steps)
            for name, given, passes in (
                ("one forward", images, 1),
                ("two forwards", images, VIEWS),
                ("contiguous", images.contiguous(), 1),
            )
        }
        costs = alternate(sides, rounds)
    world.leave()
    title = [
        f"variants: {config.model.encoder.describe()}, {config.views.size} px, batch {batch}, "
        f"{precision}, {'compiled' if trainer.compile else 'eager'}, {device_name()}",
        f"medians of {rounds} rounds of {steps} passes",
    ]
    rows = speeds("one forward", costs["one forward"], costs["two forwards"], "two forwards")
    rows += speeds("channels_last", costs["one forward"], costs["contiguous"], "contiguous")
    return Report(title, rows, out)


def _measure(trainer: Trainer, images: Tensor, passes: int, steps: int) -> Cost:
    """Measure forward and backward passes of images [V*B, 3, S, S], the views in some passes."""
    norms = [norm for norm in trainer.online.modules() if isinstance(norm, BatchNorm)]
    # A pass must not write what an earlier one keeps for its backward pass.
    statistics = [
        [torch.zeros(2, VIEWS // passes, len(n.weight), device=trainer.device) for n in norms]
        for _ in range(passes)
    ]
    work = partial(_pass, trainer, images, norms, statistics)
    work()  # the first one compiles
    return measure(lambda: repeat(work, steps), steps * trainer.recipe.batch.size)


def _pass(
    trainer: Trainer, images: Tensor, norms: list[BatchNorm], statistics: list[list[Tensor]]
) -> None:
    """Pass the images forward and backward, in as many forward passes as there are statistics."""
    terms = []
    for part, held in zip(images.chunk(len(statistics)), statistics, strict=True):
        for norm, tensor in zip(norms, held, strict=True):
            norm.views = tensor.shape[1]
            norm.batch_mean, norm.batch_var = tensor
        with autocast(trainer.recipe.precision, trainer.device):
            prediction = trainer.online(part).prediction
        terms.append(prediction.float().square().mean())
    torch.stack(terms).sum().backward()
    trainer.online.zero_grad()


def bench_largest(
    *,
    recipe: str = "",
    most: int = 4096 if CUDA else 16,
    threads: int | None = None,
    precision: Precision = PRECISION,
    out: str = "",
) -> Report:
    """Find the largest batch that fits a device: plain, with recomputation, and with FSDP.

    The batch is doubled until the memory of the GPU does not suffice, and then halved into. The
    steps are eager, in one process.

    Args:
        recipe: Recipe file whose networks and views are used. By default it is that of `step`.
        most: Largest number of images that is tried.
        threads: Threads for torch on the CPU. By default they are the cores that the job may use.
        precision: Precision of the forward passes.
        out: File that the rows are also written to, as JSON.
    """
    check_out(out)
    if most < FIRST:
        raise InputError(f"--most must be at least {FIRST}, not {most}")
    base = load(recipe) if recipe else default_recipe()
    base = replace(
        base, threads=threads, compile=False, precision=precision, batch=BatchConfig(FIRST)
    )
    rows = []
    for name, spread in SPREADS.items():
        rows.append(_largest(name, replace(base, parallel=spread), most))
        gc.collect()  # the networks refer to themselves, so only this frees them
    title = [f"largest: {base.model.encoder.describe()}, {base.views.size} px, {device_name()}"]
    return Report(title, rows, out)


def _largest(name: str, config: Recipe, most: int) -> Row:
    with TemporaryDirectory() as folder:
        trainer, data = prepare(config, folder)
        fits, fails, memory = 0, most + 1, 0.0
        while fits < most and fails - fits > max(1, fits // 16):
            tried = min(most, 2 * fits or FIRST) if fails > most else (fits + fails) // 2
            found = _try(trainer, data, tried)
            if found is None:
                fails = tried
            else:
                fits, memory = tried, found
        world.leave()
    note = f"{memory:.1f} GiB at the peak" if CUDA else "the largest that was tried"
    return Row(f"largest batch, {name}", fits, "images", limit=most, note=note)


def _try(trainer: Trainer, data: Batch, size: int) -> float | None:
    """Take a step on `size` images, and return the peak in GiB, or None when it does not fit."""
    rows = torch.arange(size) % len(data.ids)
    batch = data._replace(
        views=data.views[:, rows],
        params=data.params[:, rows],
        labels=data.labels[rows],
        ids=data.ids[rows],
    )
    try:
        cost = measure(lambda: trainer.train_step(batch), size)
    except torch.cuda.OutOfMemoryError:
        trainer.optimizer.zero_grad()
        torch.cuda.empty_cache()
        wait()
        return None
    return cost.memory / 2**30
