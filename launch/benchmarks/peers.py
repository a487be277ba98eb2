"""Measure this project beside lightly's BYOL and beside kornia's augmentations."""

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from engine.method.augment import MEAN, STD
from engine.method.byol import BYOLConfig
from engine.method.precision import Precision, autocast
from engine.method.resnet import ResNetConfig
from engine.processes import world
from engine.recipe import Recipe
from launch.benchmarks.input import read_contents
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
from shards.order import BatchConfig
from shards.views import ViewConfig, ViewsConfig

REMEDY = "pip install 'byol-engine[peers]'"
ROWS = {  # the sides that a peer has, with the one of ours beside it and the name of the row
    "lightly": {
        "lightly: step": ("ours", "step on augmented images"),
        "lightly: training": ("training", "training end to end"),
    },
    "kornia": {"kornia: views": ("augmentation", "views on the device")},
}

Work = dict[str, Callable[[], Cost]]


def bench_peers(
    *,
    depth: Literal[18, 50] = 50 if CUDA else 18,
    size: int = 224 if CUDA else 64,
    batch: int = 256 if CUDA else 32,
    steps: int = 20 if CUDA else 3,
    rounds: int = 5,
    threads: int = 8 if CUDA else 1,
    precision: Literal["fp32", "bf16"] = "bf16" if CUDA else "fp32",
    compile: bool = CUDA,
    fresh: bool = True,
    out: str = "",
) -> Report:
    """Measure this project beside lightly's BYOL and beside kornia's augmentations.

    The networks are torchvision's ResNet with the paper's heads on all sides, and the optimizer is
    LARS, which lightly has its own of. lightly is used as its example of BYOL uses it, and with its
    BYOLTransform in a DataLoader on the same JPEGs, end to end. kornia gets the same uint8 crops
    as our augmentation, and makes the same operations of them. A peer that is not installed has
    a row that says so.

    Args:
        depth: Depth of the ResNet.
        size: Side of a view in pixels.
        batch: Images in a batch.
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
    require_positive(size=size, batch=batch, steps=steps, rounds=rounds, threads=threads)
    config = Recipe(
        threads=threads,
        compile=compile,
        precision=precision,
        batch=BatchConfig(batch),
        model=BYOLConfig(ResNetConfig(depth=depth)),
        views=ViewsConfig(size=size),
    )
    with TemporaryDirectory() as folder, empty_caches(compile and fresh):
        trainer, data = prepare(config, folder)
        sides = Sides(trainer, data, steps)
        contents = read_contents(trainer.data.order, 1)
        missing: dict[str, str] = {}
        work = {name: sides.work()[name] for name in ("ours", "training", "augmentation")}
        for peer, make in (
            ("lightly", partial(_lightly, sides, contents, depth, precision)),
            ("kornia", partial(_kornia, sides, config.views)),
        ):
            try:
                work |= make()
            except ImportError as error:
                missing[peer] = f"{peer} is not installed ({error}): {REMEDY}"
        costs = alternate(work, rounds)
    world.leave()
    title = [
        f"peers: ResNet-{depth}, {size} px, batch {batch}, {precision}, ours "
        f"{'compiled' if trainer.compile else 'eager'}, {device_name()}, threads {threads}",
        f"medians of {rounds} rounds of {steps} steps",
    ]
    return Report(title, _rows(costs, missing), out)


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


def _lightly(sides: Sides, contents: list[bytes], depth: int, precision: Precision) -> Work:
    """Build lightly's sides: a step on our augmented images, and training from JPEGs."""
    from lightly.transforms.byol_transform import (
        BYOLTransform,
        BYOLView1Transform,
        BYOLView2Transform,
    )

    trainer, steps = sides.trainer, sides.steps
    device, batch, size = trainer.device, sides.batch, trainer.recipe.views.size
    training = _LightlyTraining(depth, precision, device, trainer.peak_lr)
    transform = BYOLTransform(
        BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size)
    )
    images = _Images(contents, transform)

    def load() -> Iterator[tuple[Tensor, Tensor]]:
        for view1, view2 in DataLoader(
            images,
            batch,
            sampler=itertools.cycle(range(len(contents))),
            num_workers=trainer.threads,
            pin_memory=CUDA,
            multiprocessing_context="fork",  # so that the images' bytes are shared and not sent
        ):
            yield view1.to(device, non_blocking=True), view2.to(device, non_blocking=True)

    def step() -> Cost:
        work = partial(training.step, sides.view1, sides.view2)
        return measure(lambda: repeat(work, steps), steps * batch)

    def train() -> Cost:
        batches = load()
        repeat(lambda: training.step(*next(batches)), 2)  # the workers start, and fill their queue
        return measure(lambda: repeat(lambda: training.step(*next(batches)), steps), steps * batch)

    training.step(sides.view1, sides.view2)  # the first step makes buffers
    return {"lightly: step": step, "lightly: training": train}


class _LightlyTraining:
    """BYOL as lightly's example for plain PyTorch writes it."""

    def __init__(self, depth: int, precision: Precision, device: torch.device, lr: float) -> None:
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad, get_weight_decay_parameters
        from lightly.utils.lars import LARS

        self.autocast = partial(autocast, precision, device)
        backbone: Any = getattr(torchvision.models, f"resnet{depth}")()
        features, backbone.fc = backbone.fc.in_features, nn.Identity()
        self.online = nn.Sequential(backbone, BYOLProjectionHead(features, 4096, 256)).to(device)
        self.target = copy.deepcopy(self.online)
        deactivate_requires_grad(self.target)
        self.prediction_head = BYOLPredictionHead(256, 4096, 256).to(device)
        self.criterion = NegativeCosineSimilarity()
        decayed, others = get_weight_decay_parameters([self.online, self.prediction_head])
        self.optimizer = LARS(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=lr,
            momentum=0.9,
            weight_decay=1.5e-6,
        )

    def step(self, view1: Tensor, view2: Tensor) -> Tensor:
        """Make one update on views [B, 3, S, S], and return the loss []."""
        from lightly.models.utils import update_momentum

        update_momentum(self.online, self.target, m=0.996)
        with self.autocast():
            p1, p2 = (self.prediction_head(self.online(view)) for view in (view1, view2))
            with torch.no_grad():
                z1, z2 = self.target(view1), self.target(view2)
            loss: Tensor = 0.5 * (self.criterion(p1, z2) + self.criterion(p2, z1))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class _Images(Dataset[Any]):
    """Both views of JPEGs that are in memory."""

    def __init__(self, contents: list[bytes], transform: Callable[[Image.Image], Any]) -> None:
        self.contents, self.transform = contents, transform

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, place: int) -> Any:
        return self.transform(Image.open(io.BytesIO(self.contents[place])).convert("RGB"))


def _kornia(sides: Sides, views: ViewsConfig) -> Work:
    """Build kornia's side, which makes both views of the uint8 crops that ours gets."""
    first, second = (
        _kornia_view(view, views.size).to(sides.trainer.device) for view in views.views
    )
    crops1, crops2 = sides.data.views  # [B, 3, S, S] each
    steps = sides.steps

    def make() -> None:
        first(crops1.float() / 255)
        second(crops2.float() / 255)

    make()
    return {
        "kornia: views": lambda: measure(lambda: repeat(make, steps), steps * sides.batch),
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
