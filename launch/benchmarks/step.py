"""A training step of this project beside eager PyTorch as usually written."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from engine import byol
from engine.adamw import AdamWConfig
from engine.byol import BYOLConfig, Online, Target, regression_loss
from engine.lars import LARS, LARSConfig, parameter_groups
from engine.norm import BatchNorm
from engine.precision import autocast
from engine.recipe import Recipe, load
from engine.resnet import ResNet, ResNetConfig
from engine.trainer import Trainer
from launch.benchmarks.measuring import (
    CORES,
    CUDA,
    alternate,
    device_name,
    measure,
    repeat,
    require_positive,
    row,
    show,
    show_ratio,
    wait,
)
from shards import synthetic
from shards.loader import Batch, DataConfig
from shards.order import BatchConfig
from shards.views import ViewsConfig

PEAK_TFLOPS = {  # dense bf16, by torch's name of the device
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA L4": 121,
}


def bench_step(
    *,
    recipe: str = "",
    batch: int | None = None,
    steps: int = 10,
    rounds: int = 3,
    threads: int = CORES,
    precision: Literal["fp32", "bf16"] = "bf16" if CUDA else "fp32",
    compile: bool = CUDA,
    peak_tflops: float | None = None,
) -> None:
    """A training step: both networks forward, backward, optimizer, moving average.

    Stock is eager PyTorch as usually written: each view in a forward of its own, torch's batch
    norm, torchvision's ResNet where it has the recipe's, contiguous NCHW images, LARS and moving
    average in Python loops over the tensors, cuDNN free to choose its kernels by timing. Both
    sides start from the same weights and see the same images, augmented before; the augmentation
    is timed by itself.

    Args:
        recipe: Recipe file whose networks, views and optimizer are taken. Without it: on CUDA
            ResNet-50 at 224 px, batch 256; else ResNet-18, width 0.25, at 32 px, batch 128.
        batch: Images in a batch, in place of the recipe's.
        steps: Steps in a round.
        rounds: Times that each side is measured.
        threads: Of torch on the CPU.
        precision: Of both sides' forward passes.
        compile: Compile our networks.
        peak_tflops: What the device can do, to tell the share that is used. Known for some GPUs
            in bf16.
    """
    base = load(recipe) if recipe else _default_recipe()
    batch = base.batch.size if batch is None else batch
    require_positive(batch=batch, steps=steps, rounds=rounds, threads=threads)
    config = replace(
        base, threads=threads, compile=compile, precision=precision, batch=BatchConfig(batch)
    )
    with TemporaryDirectory() as folder:
        trainer, data = prepare(config, folder)
    work, flops = _step_work(trainer, data)
    sides = {
        name: partial(measure, partial(repeat, step, steps), steps * batch)
        for name, step in work.items()
    }
    costs = alternate(sides, rounds)

    encoder = config.model.encoder
    print(
        f"step: ResNet-{encoder.depth} x{encoder.width:g}, {config.views.size} px, batch {batch}, "
        f"{precision}, {'compiled' if compile else 'eager'}, {device_name()}, threads {threads}"
    )
    print(f"medians of {rounds} rounds of {steps} steps")
    row("", "images/s", "images/core-s")
    show("ours: step on augmented images", costs["ours"])
    show("ours: augmentation", costs["augmentation"])
    show("stock: step on augmented images", costs["stock"])
    show_ratio("ours / stock", costs["ours"], costs["stock"])
    own, theirs = (max(cost.memory for cost in costs[side]) for side in ("ours", "stock"))
    print(f"peak memory: ours {own / 2**30:.2f} GiB, stock {theirs / 2**30:.2f} GiB")
    known = PEAK_TFLOPS.get(device_name()) if precision == "bf16" else None
    if peak := peak_tflops or known:
        own_share, share = (
            flops / median(cost.wall for cost in costs[side]) / (peak * 1e12)
            for side in ("ours", "stock")
        )
        print(
            f"model FLOPs utilisation of {peak:g} TFLOP/s: ours {own_share:.1%}, stock {share:.1%}"
        )


def _default_recipe() -> Recipe:
    if CUDA:
        return Recipe(batch=BatchConfig(256))
    encoder = ResNetConfig(depth=18, width=0.25, stem="cifar")
    return Recipe(
        batch=BatchConfig(128),
        model=BYOLConfig(encoder, hidden=512, projection=128),
        views=ViewsConfig(size=32),
    )


def prepare(recipe: Recipe, folder: str) -> tuple[Trainer, Batch]:
    """A trainer of the recipe, and a batch of drawn images; files go to `folder`."""
    data = f"{folder}/data"
    synthetic.write(data, recipe.batch.size, 32, seed=0)
    recipe = replace(
        recipe,
        run=f"{folder}/run",
        data=DataConfig(data, streams=1),
        probe=replace(recipe.probe, every=0, baseline=False),
        checkpoint=replace(recipe.checkpoint, resume=""),
    )
    recipe.check()
    trainer = Trainer(recipe)
    trainer.step = 1  # at 0 the learning rate is 0
    with closing(trainer.batches()) as batches:
        return trainer, next(batches)


def _step_work(trainer: Trainer, data: Batch) -> tuple[dict[str, Callable[[], object]], float]:
    """What is timed, each run once; and the FLOPs that a step takes for an image."""
    data = data._replace(
        views=data.views.to(trainer.device),
        params=data.params.to(trainer.device),
        labels=data.labels.to(trainer.device),
    )
    views, params = data.views.flatten(0, 1), data.params.flatten(0, 1)
    augment_views = trainer.augment
    start = time.perf_counter()
    images = augment_views(views, params)  # [V*B, 3, S, S]
    trainer.augment = lambda *_: images
    first = trainer.train_step(data)
    wait()
    seconds = time.perf_counter() - start

    stock = Stock(trainer.recipe, trainer.classes, trainer.device)
    view1, view2 = images.contiguous().chunk(2)
    stock_step = partial(stock.step, view1, view2, data.labels, first.lr, first.tau)
    with FlopCounterMode(display=False) as counter:
        loss = stock_step()
    print(f"first step, compiling where compiled: {seconds:.1f} s")
    print(f"loss of the same batch and weights: ours {first.loss:.5f}, stock {loss:.5f}")
    work: dict[str, Callable[[], object]] = {
        "ours": lambda: trainer.train_step(data),
        "augmentation": lambda: augment_views(views, params),
        "stock": stock_step,
    }
    return work, counter.get_total_flops() / len(view1)


class Stock:
    """BYOL as it is usually written: one network, one view, one tensor at a time."""

    def __init__(self, recipe: Recipe, classes: int, device: torch.device) -> None:
        """The weights are those that a Trainer of the same recipe starts from."""
        online, target = byol.build(recipe.model, classes, recipe.seed)
        self.online = _StockNetwork(online, recipe.model.encoder).to(device)
        self.target = _StockNetwork(target, recipe.model.encoder).to(device).requires_grad_(False)
        self.optimizer = _stock_optimizer(recipe.optimizer, self.online)
        self.autocast = partial(autocast, recipe.precision, device)

    def step(self, view1: Tensor, view2: Tensor, labels: Tensor, lr: float, tau: float) -> Tensor:
        """One update on views [B, 3, S, S]; returns the loss before it."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with self.autocast():
                (_, q1, logits), (_, q2, _) = self.online(view1), self.online(view2)
                with torch.no_grad():
                    (z1, _, _), (z2, _, _) = self.target(view1), self.target(view2)
            loss = (regression_loss(q1, z2) + regression_loss(q2, z1)).mean()
            (loss + F.cross_entropy(logits, labels)).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        online = dict(self.online.named_parameters())
        with torch.no_grad():
            for name, p in self.target.named_parameters():
                p.mul_(tau).add_(online[name], alpha=1 - tau)
        return loss.detach()


class _StockNetwork(nn.Module):
    """Ours with torchvision's encoder where it has the same, and torch's batch norm."""

    def __init__(self, ours: Online | Target, config: ResNetConfig) -> None:
        super().__init__()
        self.encoder = _stock_encoder(ours.encoder, config)
        self.projector = _use_torch_norm(ours.projector, nn.BatchNorm1d)
        self.predictor: nn.Module = nn.Identity()
        self.classifier: nn.Module = nn.Identity()
        if isinstance(ours, Online):
            assert ours.classifier is not None  # the drawn images have labels
            self.predictor = _use_torch_norm(ours.predictor, nn.BatchNorm1d)
            self.classifier = ours.classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 3, S, S] -> projection, prediction and logits."""
        features = self.encoder(images)
        projection = self.projector(features)
        return projection, self.predictor(projection), self.classifier(features.detach())


def _stock_encoder(ours: ResNet, config: ResNetConfig) -> nn.Module:
    if config != ResNetConfig(config.depth) or config.depth in (10, 200):
        return _use_torch_norm(ours, nn.BatchNorm2d)
    encoder: nn.Module = torchvision.models.get_model(f"resnet{config.depth}")
    encoder.fc = nn.Identity()
    encoder.load_state_dict(ours.state_dict())
    return encoder


def _use_torch_norm(module: nn.Module, norm: type[nn.BatchNorm1d | nn.BatchNorm2d]) -> nn.Module:
    """`module`, changed in place."""
    for name, child in module.named_children():
        if isinstance(child, BatchNorm):
            replacement = norm(len(child.weight), child.eps, child.momentum)
            replacement.load_state_dict(child.state_dict())
            setattr(module, name, replacement)
        else:
            _use_torch_norm(child, norm)
    return module


def _stock_optimizer(config: LARSConfig | AdamWConfig, module: nn.Module) -> Optimizer:
    if not isinstance(config, LARSConfig):
        return config.build(module)
    groups = parameter_groups(module)
    return StockLARS(groups, config.momentum, config.weight_decay, config.trust_coefficient)


class StockLARS(LARS):
    """The same update, one tensor after the other."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad.add(p, alpha=group["weight_decay"])
                if group["adapt"]:
                    length, step = p.norm(), update.norm()
                    ratio = group["trust_coefficient"] * length / step
                    update *= torch.where((length > 0) & (step > 0), ratio, 1.0)
                momentum = self.state[p]["momentum_buffer"]
                momentum.mul_(group["momentum"]).add_(update)
                p.add_(momentum, alpha=-group["lr"])
