"""Measure a training step of this project beside eager PyTorch as it is usually written."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext, redirect_stderr
from dataclasses import replace
from io import StringIO
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.data import open_data
from engine.log.terminal import Terminal
from engine.log.timer import Timer
from engine.measuring import find_device_peak
from engine.method.byol import BYOLConfig
from engine.method.resnet import ResNetConfig
from engine.processes import world
from engine.processes.parallel import ParallelConfig
from engine.processes.step_graph import WARM_UP
from engine.recipe import Recipe, load
from engine.run import open_run
from engine.trainer import StepOutput, Trainer
from launch.benchmarks.input import PHOTOS, draw_photo
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
from launch.benchmarks.results import Report, Row, check_out, compare, speeds
from launch.benchmarks.stock import Stock
from shards.errors import InputError
from shards.loader import Batch, DataConfig
from shards.making import pack, synthetic
from shards.order import BatchConfig
from shards.views import ViewsConfig

SETTLING = 2  # steps after the first, in which DDP plans its buckets and fp16 halves its scale

_T = TypeVar("_T")


def bench_step(
    *,
    recipe: str = "",
    batch: int | None = None,
    steps: int = 10,
    rounds: int = 3,
    threads: int | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "bf16" if CUDA else "fp32",
    compile: bool = CUDA,
    cuda_graph: bool = False,
    fresh: bool = True,
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto",
    shard: int = 0,
    peak_tflops: float | None = None,
    out: str = "",
) -> Report | None:
    """Measure a training step of this project beside eager PyTorch as it is usually written.

    A step is the forward passes of both networks, the backward pass, the optimizer and the moving
    average. Stock, the usual way, passes each view forward by itself and uses torch's batch norm,
    contiguous NCHW images and, where it has the recipe's, torchvision's ResNet. Its LARS and moving
    average are Python loops over the tensors, and cuDNN may choose kernels by timing them. Both
    start from the same weights and see the same images, which were augmented before. The
    augmentation is timed by itself. So is our training from the loader, with the time that it waits
    for data.

    Under torchrun both sides are distributed. Stock uses DDP and torch's synchronized norm, which
    refuses CPUs, so there it is one that is written by hand in the usual way. Figures are for the
    global batch, with the slowest process's time and the CPU time of all.

    Args:
        recipe: Recipe file whose networks, views and optimizer are used. By default it is
            ResNet-50 at 224 px with batch 256 on CUDA, and otherwise ResNet-18 of width 0.25 at
            32 px with batch 128.
        batch: Images in a global batch, in place of the recipe's.
        steps: Steps in a round.
        rounds: Number of times that each side is measured.
        threads: Threads of each process, for torch on the CPU and for decoding. By default the
            cores that the job may use are shared out among its processes.
        precision: Precision of both sides' forward passes. In fp16 both sides scale the loss.
        compile: Compile our networks.
        cuda_graph: Measure our steps by a CUDA graph too, on one GPU.
        fresh: Compile with empty caches, which takes minutes for a ResNet-50 on a GPU. --no-fresh
            takes what was compiled on this machine before.
        strategy: How our step is spread over processes.
        shard: Processes in a group of hsdp. 0 stands for those of one machine.
        peak_tflops: Peak speed of a device in TFLOP/s, to print the share that is used. By default
            it is the vendor's figure, for GPUs that are known.
        out: File that the rows are also written to, as JSON.
    """
    check_out(out)
    base = load(recipe) if recipe else default_recipe()
    batch = base.batch.size if batch is None else batch
    require_positive(batch=batch, steps=steps, rounds=rounds)
    if threads is not None:
        require_positive(threads=threads)
    config = replace(
        base,
        threads=threads,
        compile=compile,
        cuda_graph=cuda_graph,
        precision=precision,
        batch=BatchConfig(batch),
        parallel=ParallelConfig(strategy, shard),
    )
    with TemporaryDirectory() as folder, empty_caches(compile and fresh):
        trainer, data = prepare(config, folder)
        sides = Sides(trainer, data, steps)
        with nullcontext() if trainer.world.main else redirect_stderr(StringIO()):
            costs = alternate(sides.work(), rounds)
    main, distributed = trainer.world.main, trainer.world.distributed
    world.leave()
    if not main:
        return None

    encoder = config.model.encoder
    title = [
        f"step: {encoder.describe()}, {config.views.size} px, batch {batch}, "
        f"{precision}, {'compiled' if trainer.compile else 'eager'}, {device_name()}, "
        f"threads {trainer.threads}"
    ]
    if distributed:
        size, ours = trainer.world.size, trainer.parallel.strategy
        title.append(f"processes {size}: ours {ours}, stock ddp; figures are of all together")
        if size > 1 and not CUDA:
            title.append("stock's synchronized norm is made by hand, because torch's refuses CPUs")
    title.append(f"medians of {rounds} rounds of {steps} steps")
    peak = peak_tflops * 1e12 if peak_tflops else find_device_peak(trainer)
    most = peak * trainer.world.size / sides.flops if peak else None
    return Report(title, sides.rows(costs, most), out)


def default_recipe() -> Recipe:
    if CUDA:
        return Recipe(batch=BatchConfig(256))
    encoder = ResNetConfig(depth=18, width=0.25, stem="cifar")
    return Recipe(
        batch=BatchConfig(128),
        model=BYOLConfig(encoder, hidden=512, projection=128),
        views=ViewsConfig(size=32),
    )


def empty_caches(fresh: bool) -> AbstractContextManager[None]:
    """Use empty compiler caches, so that nothing compiled by earlier runs shortens the compile."""
    if not fresh:
        return nullcontext()
    from torch._inductor.utils import fresh_cache

    caches: AbstractContextManager[None] = fresh_cache()
    return caches


def prepare(recipe: Recipe, folder: str) -> tuple[Trainer, Batch]:
    """Make a trainer of the recipe and a batch of drawn images. Files go to `folder`.

    Every process draws all images to a folder of its own, because machines may share no folder.
    """
    here, batch = world.join(recipe.threads, recipe.parallel.strategy != "auto"), recipe.batch
    size = here.size
    if batch.size % size:
        raise InputError(f"--batch {batch.size} is not divisible by {size} processes")
    data = f"{folder}/data"
    if recipe.views.size > 64:
        write_photos(data, batch.size)
    else:
        synthetic.write(data, batch.size, 32, seed=0)
    recipe = replace(
        recipe,
        run=f"{folder}/run",
        data=DataConfig(data, streams=size),
        probe=replace(recipe.probe, every=0, baseline=False),
        checkpoint=replace(recipe.checkpoint, resume=""),
    )
    recipe.check()
    terminal = Terminal(here.main)
    opened = open_data(recipe, here, terminal.say)
    run = open_run(recipe, opened.train.digest, here, terminal)
    trainer = Trainer(recipe, here, opened, run)
    trainer.step = 1  # at step 0 the learning rate would be 0
    with closing(trainer.batches()) as batches:
        return trainer, next(batches)


def write_photos(url: str, samples: int) -> None:
    """Write shards of photos as large as ImageNet's, so that decoding costs as much as theirs."""
    photos = [draw_photo(i) for i in range(min(samples, PHOTOS))]
    entries = [pack.Image(f"{i}.jpg", len(photos[i % len(photos)]), i % 8) for i in range(samples)]
    plan = pack.plan_shards(pack.ImageSet("", entries, list("abcdefgh")), 16_000_000, seed=0)
    pack.write_shards(
        plan, url, lambda image: photos[int(image.path[:-4]) % len(photos)], threads=1
    )


class Sides:
    """The sides that take turns. The constructor takes each side's first steps, which compile."""

    def __init__(self, trainer: Trainer, data: Batch, steps: int) -> None:
        self.trainer, self.steps, self.batch = trainer, steps, trainer.recipe.batch.size
        self.data = data._replace(
            views=data.views.to(trainer.device),
            params=data.params.to(trainer.device),
            labels=data.labels.to(trainer.device),
        )
        self.augment = trainer.augment
        self.waits: list[float] = []  # share of each round's time that training waits for data

        self.images, seconds = _timed(self._augmented)  # [V*b, 3, S, S]
        first, more = _timed(self._own_step)
        self.first = {"ours": seconds + more}  # seconds
        repeat(self._own_step, SETTLING)
        self.held = {"ours": _allocated()}  # bytes between steps, with both sides' images
        self.held["graph"] = 0
        if trainer.graph is not None:
            repeat(self._graph_step, WARM_UP + 1)  # the last one, if not an earlier one, records
            self.held["graph"] = _allocated() - self.held["ours"]

        self.stock = Stock(trainer.recipe, trainer.classes, trainer.device)
        self.view1, self.view2 = self.images.contiguous().chunk(2)
        self.rates = first.lr, first.tau
        loss, self.first["stock"] = _timed(self._stock_step)
        with FlopCounterMode(display=False) as counter:
            self._stock_step()
        self.flops = counter.get_total_flops() / len(self.view1)  # per image
        repeat(self._stock_step, SETTLING)
        self.held["stock"] = _allocated() - sum(self.held.values())

        losses = torch.stack([first.loss, loss / trainer.world.size]).detach().cpu()
        self.losses = trainer.world.all_reduce(losses).tolist()
        self.first = {
            side: max(trainer.world.all_gather_object(seconds))
            for side, seconds in self.first.items()
        }

    def work(self) -> dict[str, Callable[[], Cost]]:
        sides = {
            "ours": lambda: self._cost(self._own_step, "stock", "graph"),
            "augmentation": lambda: self._cost(self._augmented),
            "training": self._train,
            "stock": lambda: self._cost(self._stock_step, "ours", "graph"),
        }
        if self.trainer.graph is not None:
            sides["by graph"] = lambda: self._cost(self._graph_step, "stock")
        return sides

    def rows(self, costs: dict[str, list[Cost]], most: float | None) -> list[Row]:
        """Return all figures. `most` is the images a second of a device at its peak."""
        ours, colors, stock = costs["ours"], costs["augmentation"], costs["stock"]
        rows = speeds("step on augmented images", ours, stock, limit=most)
        if by_graph := costs.get("by graph"):
            rows += speeds("step by a CUDA graph", by_graph, ours, "ordinary", limit=most)
            assert self.trainer.graph is not None
            usual = [max(1, cost.memory) / 2**30 for cost in ours]
            own = self.trainer.graph.memory / 2**30  # beside that of ordinary steps, which stay
            held = [memory + own for memory in usual]
            rows.append(compare("peak memory with a CUDA graph", held, usual, "GiB", "without"))
        rows += speeds("augmentation", colors)
        alone = 1 / (_wall(ours) + _wall(colors))  # images/s when data is there at once
        rows += speeds("training from the loader", costs["training"], limit=alone)
        steady = {side: self.batch * _wall(costs[side]) for side in costs}
        own = max(0.0, self.first["ours"] - steady["ours"] - steady["augmentation"])
        theirs = max(0.0, self.first["stock"] - steady["stock"])
        rows.append(Row("first step, beyond a usual one", own, "s", theirs, "stock"))
        own_memory, their_memory = (
            [max(1, cost.memory) / 2**30 for cost in side] for side in (ours, stock)
        )
        row = compare("peak memory", own_memory, their_memory, "GiB")
        rows.append(row if CUDA else replace(row, note="one process holds both sides"))
        rows.append(Row("data wait of our training", 100 * median(self.waits), "%"))
        own, theirs = self.losses
        rows.append(Row("loss of the same batch and weights", own, "", theirs, "stock"))
        return rows

    def _own_step(self) -> StepOutput:
        self.trainer.augment = lambda *_: self.images
        self.trainer.step = 1  # each round has the rates of the first
        return self.trainer.train_step(self.data)

    def _graph_step(self) -> StepOutput:
        assert self.trainer.graph is not None
        self.trainer.graph.active = True
        output = self._own_step()
        self.trainer.graph.active = False
        return output

    def _augmented(self) -> Tensor:
        return self.augment(self.data.views.flatten(0, 1), self.data.params.flatten(0, 1))

    def _stock_step(self) -> Tensor:
        return self.stock.step(self.view1, self.view2, self.data.labels, *self.rates)

    def _cost(self, step: Callable[[], object], *without: str) -> Cost:
        """Measure the cost of some steps, less the memory that the sides `without` hold."""
        self._meet()
        cost = measure(lambda: repeat(step, self.steps), self.steps * self.batch)
        held = sum(self.held[side] for side in without)
        return self._together(cost._replace(memory=cost.memory - held))

    def _train(self) -> Cost:
        """Measure some steps of training as `fit` takes them, and note the share of data waits."""
        trainer = self.trainer
        trainer.augment, trainer.step = self.augment, 1
        with closing(trainer.batches()) as batches:

            def step() -> None:
                with timer.waiting():
                    batch = next(batches)
                trainer.train_step(batch)
                trainer.guard.count_skips()  # like `fit`, wait for the step before this one

            timer = Timer()
            repeat(step, SETTLING)  # the first step opens the shards, and batches gather behind it
            self._meet()
            wait()
            timer = Timer()
            cost = measure(lambda: repeat(step, self.steps), self.steps * self.batch)
            share = timer.read(self.batch)["data_wait"]
        self.waits.append(max(trainer.world.all_gather_object(share)))
        return self._together(cost)

    def _meet(self) -> None:
        if self.trainer.world.distributed:
            dist.barrier()

    def _together(self, cost: Cost) -> Cost:
        """Return the slowest process's time, the CPU time of all, and the largest memory."""
        walls, cpus, memories = zip(*self.trainer.world.all_gather_object(cost), strict=True)
        return Cost(max(walls), sum(cpus), max(memories))


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    """Call `work`, and return its result and the seconds that it took."""
    start = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - start


def _allocated() -> int:
    """Return the bytes of the GPU that are in use, or 0 on the CPU, where they are not counted."""
    wait()
    return torch.cuda.memory_allocated() if CUDA else 0


def _wall(costs: list[Cost]) -> float:
    """Return the median seconds for an image."""
    return median(cost.wall for cost in costs)
