"""Predict the memory and communication of a training step on machines that are not available."""

import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket, _resolve_process_group
from torch._ops import OpOverload
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.method import byol
from engine.method.byol import VIEWS, Online, Target, update_target
from engine.method.head import whole_loss
from engine.method.local_shards import local
from engine.method.precision import autocast, parameter_dtype
from engine.method.resnet import ResNetConfig
from engine.processes import parallel
from engine.processes.parallel import Parallel
from engine.processes.world import World
from engine.recipe import Recipe, load
from launch.benchmarks.measuring import require_positive
from launch.benchmarks.results import Report, Row, check_out
from shards.errors import InputError
from shards.order import rank_streams

Spreading = Literal["ddp", "fsdp", "hsdp"]
Depth = Literal[10, 18, 34, 50, 101, 152, 200]

ROWS, SIZE = 2, 32  # a view's images and their side: nothing that is counted depends on them
SETTLING = 3  # steps until DDP has arranged its buckets and communicated that

KINDS = {  # only the engine's batch norms use functional collectives
    "_c10d_functional::all_reduce": "norms' all-reduce",
    "c10d::allreduce_": "all-reduce",
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
}
PARTS = ("online forward", "target forward", "backward", "optimizer", "moving average")


class Entry(NamedTuple):
    """Identifies the collectives that are counted together."""

    part: str  # the part of the step, one of PARTS
    kind: str
    processes: int  # number of processes that take part in each collective


class Traffic(NamedTuple):
    """The communication of an entry in one step."""

    collectives: int
    bytes: int  # size of the tensors that this process handed in


class Need(NamedTuple):
    """The memory and communication that one process needs."""

    state: dict[str, int]  # bytes held all the time, or from backward to optimizer
    traffic: dict[Entry, Traffic]


def bench_plan(
    *,
    recipe: str = "r50_4096",
    processes: tuple[int, ...] = (64, 512),
    strategies: tuple[Spreading, ...] = ("ddp", "fsdp", "hsdp"),
    shard: int = 8,
    depth: Depth | None = None,
    width: float | None = None,
    classes: int = 1000,
    out: str = "",
) -> Report:
    """Predict the memory and communication of a training step on machines that are not available.

    Only the first of all processes runs, on this CPU. The others are assumed to hold the same
    values and to answer at once. The process builds the networks and the optimizer as a training
    does, and takes eager steps on tiny images. Neither the parameters nor their communication
    depend on the images. The last step is counted.

    Memory is the bytes of the parameters, of the gradients after the backward pass and of the
    optimizer's state. Only this process's part counts, and the first process has the largest part.
    Activations are not counted, and neither are parameters that are gathered while they are used.
    Communication is every collective that the process takes part in, and the bytes of the tensors
    that it hands in. It hands its own part to an all-gather and the whole to a reduce-scatter. How
    often these bytes travel depends on the library's algorithm.

    The plain all-reduce of the backward pass sums gradients. The optimizer's sums squared norms.

    Args:
        recipe: Recipe file whose networks, precision, micro-batches and optimizer are used.
        processes: Numbers of processes. Each is measured.
        strategies: Ways of spreading a step over the processes. Each is measured with every number
            of processes.
        shard: Processes in a group of hsdp, usually those of one machine.
        depth: Depth of the ResNet, in place of the recipe's.
        width: Width of the ResNet, in place of the recipe's.
        classes: Number of classes, for the online classifier. 0 leaves the classifier out.
        out: File that the rows are also written to, as JSON.
    """
    check_out(out)
    config = _with_encoder(load(recipe), depth, width)
    require_positive(shard=shard)
    if classes < 0:
        raise InputError(f"--classes must be at least 0, not {classes}")
    for size in processes:
        _check(config, size, shard if "hsdp" in strategies else None)
    encoder, optimizer = config.model.encoder, type(config.optimizer).__name__
    title = [
        f"plan: {encoder.describe()}, {classes} classes, {config.precision}, "
        f"{optimizer.removesuffix('Config')}; the largest part that a process has"
    ]
    rows: list[Row] = []
    for strategy in strategies:
        for size in processes:
            rows += _tell(strategy, size, shard, need(config, strategy, size, shard, classes))
            gc.collect()  # wrapped networks refer to themselves, so only this frees them
    return Report(title, rows, out)


def _with_encoder(recipe: Recipe, depth: Depth | None, width: float | None) -> Recipe:
    """Replace the encoder's depth and width, and check the recipe.

    The URLs of the run and the data are not checked, because they are not needed.
    """
    encoder = recipe.model.encoder
    if isinstance(encoder, ResNetConfig):
        depth, width = depth or encoder.depth, encoder.width if width is None else width
        encoder = replace(encoder, depth=depth, width=width)
    elif depth is not None or width is not None:
        raise InputError(f"--depth and --width are for ResNets, and this is {encoder.describe()}")
    recipe = replace(recipe, model=replace(recipe.model, encoder=encoder))
    replace(recipe, run="-", data=replace(recipe.data, train="-", val="-")).check()
    return recipe


def _check(recipe: Recipe, processes: int, shard: int | None) -> None:
    if processes < 2:
        raise InputError(f"--processes must be at least 2, not {processes}")
    rank_streams(recipe.data.streams, 0, processes)
    if shard is not None and not (1 < shard < processes and processes % shard == 0):
        fitting = [n for n in range(2, processes // 2 + 1) if processes % n == 0]
        nearest = min(fitting, key=lambda n: abs(n - shard), default=None)
        give = f"give --shard {nearest}, or " if nearest else ""
        raise InputError(
            f"--shard {shard}: hsdp divides {processes} processes into two or more equal groups "
            f"of at least two: {give}leave hsdp out by --strategies ddp fsdp"
        )


def _tell(strategy: str, processes: int, shard: int, need: Need) -> list[Row]:
    """Make the rows of what a process holds, and of what it hands over in a step."""
    groups = f" in groups of {shard}" if strategy == "hsdp" else ""
    where = f"{strategy}, {processes} processes{groups}"
    rows = [_row(f"{where}: {name}", size) for name, size in need.state.items()]
    rows.append(_row(f"{where}: held in all", sum(need.state.values())))
    for part in PARTS:
        entries = {entry: t for entry, t in need.traffic.items() if entry.part == part}
        if not entries:
            rows.append(_row(f"{where}: {part}", 0, "0 collectives"))
        for entry, traffic in entries.items():
            note = f"{traffic.collectives} collectives of {entry.processes} processes"
            rows.append(_row(f"{where}: {part}, {entry.kind}", traffic.bytes, note))
    count = sum(traffic.collectives for traffic in need.traffic.values())
    total = sum(traffic.bytes for traffic in need.traffic.values())
    rows.append(_row(f"{where}: handed over in all", total, f"{count} collectives"))
    return rows


def _row(name: str, size: int, note: str = "") -> Row:
    return Row(name, size / 2**20, "MiB", note=note)


def need(recipe: Recipe, strategy: Spreading, processes: int, shard: int, classes: int) -> Need:
    """Count the memory and communication of the first of `processes` processes.

    hsdp spreads the parameters over groups of `shard` processes.
    """
    with _pretended(processes, shard) as world:
        online, target = byol.build(recipe.model, classes, recipe.seed, recipe.views.size)
        for network in (online, target):
            network.to(world.device, parameter_dtype(recipe.precision))
        spread = parallel.parallelize(
            online,
            target,
            replace(recipe.parallel, shard=shard),
            strategy,
            world,
            compile=False,
            static=recipe.batch.micro == 1,
        )
        if isinstance(spread.online, DistributedDataParallel):
            spread.online.register_comm_hook(None, _all_reduce)
        optimizer: torch.optim.Optimizer = recipe.optimizer.build(online, spread.shard_group)
        for _ in range(SETTLING):
            _step(recipe, world, spread, online, target, optimizer)
        traffic, gradients = _step(recipe, world, spread, online, target, optimizer)
        state = {
            "parameters": _bytes(online.parameters()),
            "gradients": gradients,
            "optimizer": _bytes(tree_leaves(list(optimizer.state.values()))),
            "target's parameters": _bytes(target.parameters()),
        }
        return Need(state, traffic)


@contextmanager
def _pretended(processes: int, shard: int) -> Iterator[World]:
    """Set up a process group in which the other processes are only pretended."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield World(0, processes, shard, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _all_reduce(_: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """All-reduce a bucket as DDP's own hook does, but return a result that is ready.

    DDP waits for a result, and the pretended group gives none.
    """
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _step(
    recipe: Recipe,
    world: World,
    spread: Parallel,
    online: Online,
    target: Target,
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[Entry, Traffic], int]:
    """Take one step as the trainer does, but at learning rate 0.

    Returns the step's traffic and the bytes of the gradients.
    """
    counts = {part: Count() for part in PARTS}
    dtype = parameter_dtype(recipe.precision)
    micro = recipe.batch.micro
    for number in range(1, micro + 1):
        images = torch.rand(VIEWS * ROWS, 3, SIZE, SIZE, dtype=dtype)
        with spread.micro_batch(last=number == micro):
            with autocast(recipe.precision, world.device):
                with counts["online forward"]:
                    output = spread.online(images)
                with counts["target forward"], torch.no_grad():
                    projection = target(images)
            loss = whole_loss(output, projection, torch.zeros(ROWS, dtype=torch.int64))
            with counts["backward"]:
                loss.backward()
    gradients = _bytes(p.grad for p in online.parameters() if p.grad is not None)
    with counts["optimizer"]:
        optimizer.step()
    optimizer.zero_grad()
    moved, towards = byol.pair_parameters(target, online)
    with counts["moving average"]:
        update_target(local(moved), local(towards), torch.zeros((), dtype=dtype))
    traffic = {
        Entry(part, *key): Traffic(len(sizes), sum(sizes))
        for part, count in counts.items()
        for key, sizes in count.sizes.items()
    }
    return traffic, gradients


class Count(TorchDispatchMode):
    """Records the bytes handed to each collective while it is entered, by kind and group size."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[tuple[str, int], list[int]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func: OpOverload, args: Any) -> None:
        given = {
            argument.name: value
            for argument, value in zip(func._schema.arguments, args, strict=False)
        }
        if "process_group" in given:
            group = ProcessGroup.unbox(given["process_group"])
        elif "group_name" in given:
            group = _resolve_process_group(given["group_name"])
        else:
            return  # this is not a collective, but the wait for one
        # Gathers and scatters also take the tensors for their output, which do not count.
        inputs = [value for name, value in given.items() if not name.startswith("output")]
        name = func._schema.name
        self.sizes[KINDS.get(name, name), group.size()].append(_bytes(tree_leaves(inputs)))


def _bytes(values: Iterable[Any]) -> int:
    """Sum the bytes of the tensors among `values`. Only this process's part of each counts."""
    return sum(t.nbytes for t in local(v for v in values if isinstance(v, Tensor)))
