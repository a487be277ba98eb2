"""Ours beside the stock PyTorch way, measured in the same run.

    python launch/bench.py input     images per second, and per second of a core, of the pipeline
    python launch/bench.py step      images per second and peak memory of a training step

Both sides take turns in every round. A figure is the median over the rounds, a ratio is that of
the medians, and behind it stand the smallest and the largest ratio of a single round. On a machine
that is not idle use --threads 1 and the column per core-second: threads of torch that wait for
each other spin. Memory and the workers' CPU time are read from Linux's /proc.
"""

import io
import itertools
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import tyro
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from engine import byol, parallel
from engine.augment import MEAN, STD, augment
from engine.byol import BYOLConfig, Online, Target, regression_loss
from engine.lars import LARS, AdamWConfig, LARSConfig, parameter_groups
from engine.norm import BatchNorm
from engine.precision import autocast
from engine.recipe import Recipe, load
from engine.resnet import ResNet, ResNetConfig
from engine.trainer import Trainer
from shards import index as indexes
from shards import pack, storage, synthetic
from shards.errors import InputError
from shards.index import Index
from shards.loader import Batch, DataConfig, TrainLoader
from shards.order import BatchConfig, Order, rank_streams
from shards.reader import BlockReader
from shards.views import ViewConfig, ViewsConfig

PHOTOS = 200  # drawn when no data is given
PEAK_TFLOPS = {  # dense bf16, by torch's name of the device
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA L4": 121,
}
CUDA = torch.cuda.is_available()
CORES = os.cpu_count() or 1


# Measuring ----------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What an image costs."""

    wall: float  # seconds
    cpu: float  # seconds of a core, in this process and its workers
    memory: int  # peak bytes, of the GPU or else of this process

    def then(self, other: "Cost") -> "Cost":
        """One after the other."""
        memory = max(self.memory, other.memory)
        return Cost(self.wall + other.wall, self.cpu + other.cpu, memory)


def measure(work: Callable[[], object], images: int) -> Cost:
    """The cost of each of the `images` that a call of `work` goes through."""
    _reset_peak()
    _wait()
    wall, cpu = time.perf_counter(), _cpu_seconds()
    work()
    _wait()
    wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
    return Cost(wall / images, cpu / images, _peak())


def alternate(sides: Mapping[str, Callable[[], Cost]], rounds: int) -> dict[str, list[Cost]]:
    """Every side's costs, one a round; every other round goes backwards."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            costs[name].append(sides[name]())
    return costs


def show(name: str, costs: list[Cost]) -> None:
    speeds = [1 / median(values) for values in _walls_and_cpus(costs)]
    _row(name, *(f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}" for speed in speeds))


def show_ratio(name: str, ours: list[Cost], stock: list[Cost]) -> None:
    pairs = zip(_walls_and_cpus(ours), _walls_and_cpus(stock), strict=True)
    _row(name, *(_ratio(theirs, own) for own, theirs in pairs))


def _walls_and_cpus(costs: list[Cost]) -> tuple[list[float], list[float]]:
    return [cost.wall for cost in costs], [cost.cpu for cost in costs]


def _ratio(over: list[float], under: list[float]) -> str:
    single = [a / b for a, b in zip(over, under, strict=True)]
    return f"{median(over) / median(under):.2f}x ({min(single):.2f} to {max(single):.2f})"


def _row(name: str, *cells: str) -> None:
    print(f"{name:<38}" + "".join(f"{cell:>24}" for cell in cells))


def _cpu_seconds() -> float:
    """CPU time of this process and of its living worker processes."""
    seconds = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def _device_name() -> str:
    return torch.cuda.get_device_name() if CUDA else "cpu"


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    if CUDA:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


# The input pipeline -------------------------------------------------------------------------


def bench_input(
    *,
    data: str = "",
    size: int = 224,
    images: int = 500,
    batch: int = 50,
    rounds: int = 3,
    threads: int = CORES,
) -> None:
    """Images to both views: this project's pipeline beside DataLoader, PIL and torchvision.

    Ours cuts and resizes two crops in threads and leaves colours and blur to the device; stock
    does everything in worker processes, one image at a time. So ours is compared twice: what
    loads the host when a GPU does the rest, and, without a GPU, the host doing all.

    Both get the same images in the same order. Stock finds their bytes in memory, ours reads its
    shards.

    Args:
        data: URL of a folder of shards, or a local tar or folder of tars, which is indexed in a
            temporary folder. Without it: drawn photos, 500x375, about 100 KB each.
        size: Side of a view in pixels.
        images: Images measured in a round, at least.
        batch: Images in a batch.
        rounds: Times that each side is measured.
        threads: Decode threads for ours, worker processes for stock.
    """
    _positive(size=size, images=images, batch=batch, rounds=rounds, threads=threads)
    device = parallel.setup(threads)
    # A stock worker makes whole batches: whole rounds of workers make their count exact.
    warm, count = 2 * threads, threads * math.ceil(images / batch / threads)
    views = ViewsConfig(size=size)
    with TemporaryDirectory() as folder:
        order = Order(_find_index(data, folder, batch), 0, math.gcd(batch, 10), batch)
        contents = _read_contents(order, warm + count)
        sample, params = _device_batch(order, views, device)
        distort: Callable[..., Tensor] = partial(augment, blur=views.ever_blur)
        if CUDA:
            distort = torch.compile(distort)
        distort(sample, params)

        def ours() -> Cost:
            with closing(_ours(order, views, threads)) as batches:
                return _steady(batches, warm, count, batch)

        def augmentation() -> Cost:
            calls = max(1, count // 2)
            return measure(lambda: _repeat(lambda: distort(sample, params), calls), calls * batch)

        def stock() -> Cost:
            return _steady(_stock_batches(contents, views, batch, threads), warm, count, batch)

        costs = alternate({"ours": ours, "augmentation": augmentation, "stock": stock}, rounds)

    source = storage.redact(data) or "drawn photos"
    print(f"input: {source}, {size} px, batch {batch}, threads or workers {threads}")
    print(f"medians of {rounds} rounds of {count * batch} images")
    _row("", "images/s", "images/core-s")
    show("ours: read, decode, two crops", costs["ours"])
    show(f"ours: augmentation on {device.type}", costs["augmentation"])
    show("stock: decode, augment both views", costs["stock"])
    show_ratio("ours / stock, host work with a GPU", costs["ours"], costs["stock"])
    if not CUDA:
        total = [a.then(b) for a, b in zip(costs["ours"], costs["augmentation"], strict=True)]
        show("ours: all on the CPU (sum)", total)
        show_ratio("ours / stock, all on the CPU", total, costs["stock"])


def _steady(batches: Iterator[object], warm: int, count: int, size: int) -> Cost:
    """The cost of an image once the pipeline runs: the first `warm` batches do not count."""
    _repeat(lambda: next(batches), warm)
    return measure(lambda: _repeat(lambda: next(batches), count), count * size)


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def _ours(order: Order, views: ViewsConfig, threads: int) -> TrainLoader:
    return TrainLoader(
        order,
        rank_streams(order.streams, rank=0, world=1),
        views,
        DataConfig(),
        micro=1,
        start=0,
        threads=threads,
        pin_memory=CUDA,
        report=partial(print, file=sys.stderr),
    )


def _device_batch(order: Order, views: ViewsConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """One batch's crops [V*B, 3, S, S] and parameters [V*B, P] on the device."""
    with closing(_ours(order, views, threads=1)) as batches:
        batch = next(batches)
    return batch.views.flatten(0, 1).to(device), batch.params.flatten(0, 1).to(device)


class _StockImages(Dataset[tuple[Tensor, Tensor]]):
    """Both augmented views of JPEGs in memory: one decode, then torchvision on PIL images."""

    def __init__(self, contents: list[bytes], views: ViewsConfig) -> None:
        self.contents = contents
        self.view1, self.view2 = (_stock_view(views, view) for view in views.views)

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image = Image.open(io.BytesIO(self.contents[place])).convert("RGB")
        return self.view1(image), self.view2(image)


def _stock_view(views: ViewsConfig, view: ViewConfig) -> Callable[[Image.Image], Tensor]:
    jitter = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    blur = transforms.Lambda(partial(_blur, sigma=view.blur_sigma))
    bicubic = transforms.InterpolationMode.BICUBIC
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop(views.size, views.area, views.ratio, bicubic),
            transforms.RandomHorizontalFlip(view.flip),
            transforms.RandomApply([jitter], view.jitter),
            transforms.RandomGrayscale(view.grayscale),
            transforms.RandomApply([blur], view.blur),
            transforms.RandomSolarize(128, view.solarize),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return composed


def _blur(image: Image.Image, sigma: tuple[float, float]) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma)))


def _stock_batches(
    contents: list[bytes], views: ViewsConfig, batch: int, workers: int
) -> Iterator[object]:
    return iter(
        DataLoader(
            _StockImages(contents, views),
            batch,
            sampler=itertools.cycle(range(len(contents))),
            num_workers=workers,
            pin_memory=CUDA,
            multiprocessing_context="fork",  # the images' bytes are shared, not sent
        )
    )


def _read_contents(order: Order, steps: int) -> list[bytes]:
    """The files of the first `steps` batches (of an epoch at most), in the order of TrainLoader."""
    fetch = cache(BlockReader(order.index).fetch)
    contents = []
    for step in range(min(steps, order.steps_per_epoch)):
        for stream in range(order.streams):
            for segment in order.batch_segments(step, stream):
                block = fetch(segment.shard, segment.block)
                for row in segment.rows.tolist():
                    offset, length = block.samples[row].image or (0, 0)
                    contents.append(bytes(block.content[offset : offset + length]))
    return contents


def _find_index(data: str, folder: str, batch: int) -> Index:
    """The index of `data`; made in `folder` where there is none."""
    if not data:
        index = _draw_photos(folder, max(PHOTOS, batch))
    elif storage.exists(storage.join(data, indexes.NAME)):
        index = indexes.load(data, "--data")
    else:
        _link_tars(data, folder)
        index = pack.index_tars(folder, classes=None, threads=4, report=lambda _: None)
    if index.samples < batch:
        raise InputError(
            f"--data {storage.redact(data)}: {index.samples} images, fewer than --batch {batch}"
        )
    return index


def _link_tars(data: str, folder: str) -> None:
    if not storage.is_local(data):
        raise InputError(
            f"--data {storage.redact(data)}: no {indexes.NAME} there; index the tars with "
            "`python launch/pack.py --index-only`"
        )
    path = Path(storage.open_filesystem(data)[1])
    if not path.exists():
        raise InputError(f"--data {data}: no such file or folder")
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not tars:
        raise InputError(f"--data {data}: no tars there; pack images with `python launch/pack.py`")
    for tar in tars:
        (Path(folder) / tar.name).symlink_to(tar.resolve())


def _draw_photos(url: str, count: int) -> Index:
    files = {f"{i}.jpg": draw_photo(i) for i in range(count)}
    entries = [pack.Image(path, len(content), -1) for path, content in files.items()]
    plan = pack.plan_shards(pack.ImageSet("", entries, []), 16_000_000, seed=0)
    index, _ = pack.write_shards(plan, url, lambda image: files[image.path], threads=2)
    return index


def draw_photo(seed: int) -> bytes:
    """A JPEG of ImageNet's usual kind, 500x375 and about 100 KB: soft shapes under fine grain."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    soft = np.asarray(shapes.resize((500, 375), Image.Resampling.BICUBIC))
    picture = np.clip(soft + rng.normal(0, 16, (375, 500, 1)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


# The training step --------------------------------------------------------------------------


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
    _positive(batch=batch, steps=steps, rounds=rounds, threads=threads)
    config = replace(
        base, threads=threads, compile=compile, precision=precision, batch=BatchConfig(batch)
    )
    with TemporaryDirectory() as folder:
        trainer, data = prepare(config, folder)
    work, flops = _step_work(trainer, data)
    sides = {
        name: partial(measure, partial(_repeat, step, steps), steps * batch)
        for name, step in work.items()
    }
    costs = alternate(sides, rounds)

    encoder = config.model.encoder
    print(
        f"step: ResNet-{encoder.depth} x{encoder.width:g}, {config.views.size} px, batch {batch}, "
        f"{precision}, {'compiled' if compile else 'eager'}, {_device_name()}, threads {threads}"
    )
    print(f"medians of {rounds} rounds of {steps} steps")
    _row("", "images/s", "images/core-s")
    show("ours: step on augmented images", costs["ours"])
    show("ours: augmentation", costs["augmentation"])
    show("stock: step on augmented images", costs["stock"])
    show_ratio("ours / stock", costs["ours"], costs["stock"])
    own, theirs = (max(cost.memory for cost in costs[side]) for side in ("ours", "stock"))
    print(f"peak memory: ours {own / 2**30:.2f} GiB, stock {theirs / 2**30:.2f} GiB")
    known = PEAK_TFLOPS.get(_device_name()) if precision == "bf16" else None
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
    _wait()
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


# The command line ---------------------------------------------------------------------------


def _positive(**fields: float) -> None:
    for name, value in fields.items():
        if value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")


def main(arguments: list[str]) -> int:
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"input": bench_input, "step": bench_step},
            prog="python launch/bench.py",
            description=__doc__,
            args=arguments,
        )
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
