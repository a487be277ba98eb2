"""Measure this project beside lightly's BYOL and beside kornia's augmentations."""

import itertools
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.method.augment import MEAN, STD
from engine.method.byol import BYOLConfig
from engine.method.resnet import ResNetConfig
from engine.processes import world
from engine.recipe import Recipe, load
from launch.benchmarks.apart import Work, apart
from launch.benchmarks.input import read_contents
from launch.benchmarks.lightly_byol import REMEDY, LightlyBYOL, check_optimizer, load_views
from launch.benchmarks.measuring import (
    CUDA,
    Cost,
    alternate,
    device_name,
    measure,
    repeat,
    require_positive,
)
from launch.benchmarks.results import Report, Row, check_out, speeds
from launch.benchmarks.step import Sides, empty_caches, prepare
from shards.errors import InputError
from shards.order import BatchConfig
from shards.views import ViewConfig, ViewsConfig

ROWS = {  # the sides that a peer has, with the one of ours beside it and the name of the row
    "lightly": {
        "lightly: step": ("ours", "step on augmented images"),
        "lightly: training": ("training", "training end to end"),
    },
    "kornia": {"kornia: views": ("augmentation", "views on the device")},
}

DEVICE = torch.device("cuda" if CUDA else "cpu")


def bench_peers(
    *,
    recipe: str = "",
    depth: Literal[18, 50] | None = None,
    size: int | None = None,
    batch: int | None = None,
    steps: int = 20 if CUDA else 3,
    rounds: int = 5,
    threads: int = 8 if CUDA else 1,
    precision: Literal["fp32", "bf16"] = "bf16" if CUDA else "fp32",
    compile: bool = CUDA,
    fresh: bool = True,
    out: str = "",
) -> Report:
    """Measure this project beside lightly's BYOL and beside kornia's augmentations.

    The networks are torchvision's with the paper's heads on all sides, and the optimizer is LARS,
    which lightly has its own of. lightly is used as its example of BYOL uses it, and with its
    BYOLTransform in a DataLoader on the same JPEGs, end to end. Like in its examples for CIFAR-10,
    it does not blur views of 32 pixels or less. kornia gets the same uint8 crops as our
    augmentation, and makes the same operations of them. Each peer runs in a process of its own,
    with the settings of PyTorch and of the C library that its users have. A peer that is not
    installed has a row that says so.

    Args:
        recipe: Recipe file whose networks, heads, views and optimizer (LARS or AdamW) are used. By
            default it is the paper's, with a ResNet of the depth below.
        depth: Depth of the ResNet, when no recipe is given. By default it is 50 on CUDA, and
            otherwise 18.
        size: Side of a view in pixels, in place of the recipe's. Without a recipe it is 224 on
            CUDA, and otherwise 64.
        batch: Images in a batch, in place of the recipe's. Without a recipe it is 256 on CUDA, and
            otherwise 32.
        steps: Steps in a round.
        rounds: Number of times that each side is measured.
        threads: Threads for torch on the CPU and for decoding, and worker processes for lightly.
        precision: Precision of the forward passes of all sides.
        compile: Compile our networks. The peers are eager, as they come.
        fresh: Compile with empty caches, which takes minutes for a ResNet-50 on a GPU. --no-fresh
            takes what was compiled on this machine before.
        out: File that the rows are also written to, as JSON.
    """
    check_out(out)
    if recipe and depth:
        raise InputError("--depth is for the networks without --recipe: leave one of them out")
    base = load(recipe) if recipe else _default_recipe(depth or (50 if CUDA else 18))
    check_optimizer(base)
    size = base.views.size if size is None else size
    batch = base.batch.size if batch is None else batch
    require_positive(size=size, batch=batch, steps=steps, rounds=rounds, threads=threads)
    config = replace(
        base,
        threads=threads,
        compile=compile,
        precision=precision,
        batch=BatchConfig(batch),
        views=replace(base.views, size=size),
    )
    with TemporaryDirectory() as folder, empty_caches(compile and fresh):
        trainer, data = prepare(config, folder)
        sides = Sides(trainer, data, steps)
        missing: dict[str, str] = {}
        work = {name: sides.work()[name] for name in ("ours", "training", "augmentation")}
        contents = read_contents(trainer.data.order, 1)
        views = sides.view1.cpu(), sides.view2.cpu()
        rates = trainer.peak_lr, trainer.recipe.schedule.base_tau
        with ExitStack() as processes:
            for peer, build, arguments in (
                ("lightly", _lightly, (trainer.recipe, views, contents, rates, steps)),
                ("kornia", _kornia, (config.views, data.views, steps)),
            ):
                try:
                    work |= processes.enter_context(apart(build, *arguments, threads=threads))
                except ImportError as error:
                    missing[peer] = f"{peer} is not installed ({error}): {REMEDY}"
            costs = alternate(work, rounds)
    world.leave()
    title = [
        f"peers: {config.model.encoder.describe()}, {size} px, batch {batch}, {precision}, ours "
        f"{'compiled' if trainer.compile else 'eager'}, {device_name()}, threads {threads}",
        f"medians of {rounds} rounds of {steps} steps",
    ]
    return Report(title, _rows(costs, missing), out)


def _default_recipe(depth: Literal[18, 50]) -> Recipe:
    return Recipe(
        batch=BatchConfig(256 if CUDA else 32),
        model=BYOLConfig(ResNetConfig(depth=depth)),
        views=ViewsConfig(size=224 if CUDA else 64),
    )


def _rows(costs: dict[str, list[Cost]], missing: dict[str, str]) -> list[Row]:
    rows: list[Row] = []
    for peer, sides in ROWS.items():
        for side, (own, name) in sides.items():
            label = f"{name}, beside {peer}"
            if peer in missing:
                (row, _) = speeds(label, costs[own])
                rows.append(replace(row, note=missing[peer]))
            else:
                rows += speeds(label, costs[own], costs[side], peer)
    return rows


def _lightly(
    recipe: Recipe,
    views: tuple[Tensor, Tensor],
    contents: list[bytes],
    rates: tuple[float, float],
    steps: int,
) -> Work:
    """Build lightly's sides: a step on our augmented images, and training from image files.

    Args:
        views: [B, 3, S, S] each.
        contents: Image files in memory.
        rates: The learning rate and tau of a step.
    """
    batch, workers = recipe.batch.size, recipe.threads or 1
    view1, view2 = (view.to(DEVICE) for view in views)
    byol = LightlyBYOL(recipe, DEVICE)

    def step() -> Cost:
        work = partial(byol.step, view1, view2, *rates)
        return measure(lambda: repeat(work, steps), steps * batch)

    def train() -> Cost:
        order: Any = itertools.cycle(range(len(contents)))
        batches = load_views(contents, order, recipe, DEVICE, workers)
        repeat(lambda: byol.step(*next(batches), *rates), 2)  # workers start, and fill their queue
        return measure(
            lambda: repeat(lambda: byol.step(*next(batches), *rates), steps), steps * batch
        )

    byol.step(view1, view2, *rates)  # the first step makes buffers
    return {"lightly: step": step, "lightly: training": train}


def _kornia(views: ViewsConfig, crops: Tensor, steps: int) -> Work:
    """Build kornia's side, which makes both views of the uint8 crops [V, B, 3, S, S] of ours."""
    first, second = (_kornia_view(view, views.size).to(DEVICE) for view in views.views)
    crops1, crops2 = crops.to(DEVICE)

    def make() -> None:
        first(crops1.float() / 255)
        second(crops2.float() / 255)

    make()
    return {
        "kornia: views": lambda: measure(lambda: repeat(make, steps), steps * len(crops1)),
    }


def _kornia_view(view: ViewConfig, size: int) -> nn.Module:
    import kornia.augmentation as K

    kernel = 2 * max(1, size // 20) + 1
    jitter = (view.brightness, view.contrast, view.saturation, view.hue)
    return nn.Sequential(
        K.RandomHorizontalFlip(p=view.flip),
        K.ColorJiggle(*jitter, p=view.jitter),
        K.RandomGrayscale(p=view.grayscale),
        K.RandomGaussianBlur((kernel, kernel), view.blur_sigma, "constant", p=view.blur),
        K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=view.solarize),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
