"""Spread a training step over processes: `choose` picks the strategy, `parallelize` applies it."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
from annotated_types import Interval
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from engine.method.byol import Online, OnlineOutput, Target
from engine.method.norm import synchronize
from engine.processes.compiling import compile_networks
from engine.processes.world import World
from shards.errors import InputError
from shards.fields import Operation

Strategy = Literal["none", "ddp", "fsdp", "hsdp"]


@dataclass(frozen=True)
class ParallelConfig:
    """Configure how a step is spread over processes. No choice changes more than the rounding."""

    strategy: Operation[Literal["auto", "ddp", "fsdp", "hsdp"]] = "auto"
    """How parameters are spread. ddp gives every process all of them. fsdp spreads them over all
    processes. hsdp spreads them over the processes of a group, and every group has all of them.
    auto takes ddp. If networks and optimizer need more than half of the smallest GPU's memory, auto
    takes hsdp when there are several machines with several GPUs each, equally many, and fsdp
    otherwise."""

    shard: Operation[Annotated[int, Interval(ge=0, le=2**20)]] = 0
    """Number of processes in a group of hsdp. 0 takes those of one machine, where all machines have
    equally many."""

    recompute: Operation[bool] = False
    """Keep only each residual block's input and compute the block again in the backward pass
    (activation checkpointing). It saves memory and takes about a quarter more time."""

    timeout: Operation[Annotated[float, Interval(ge=1, le=1e6)]] = 300
    """Seconds that a process waits for the others before it fails. Before the first step is done it
    waits half an hour."""


@dataclass(frozen=True)
class Parallel:
    """Hold what a step needs to call the online network and to control its gradients."""

    strategy: Strategy
    online: Callable[[Tensor], OnlineOutput]
    shard_group: ProcessGroup | None  # the processes that parameters are spread over
    groups: list[ProcessGroup]  # process groups of some of the processes
    _network: Online

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Wrap a micro-batch's forward and backward passes; only the last exchanges gradients."""
        if isinstance(self.online, DistributedDataParallel):
            return nullcontext() if last else self.online.no_sync()
        if isinstance(self._network, FSDPModule):
            self._network.set_requires_gradient_sync(last)
        return nullcontext()


def state_bytes(online: Online, target: Target, slots: int, averages: bool = False) -> int:
    """Return the bytes of parameters, gradients and optimizer state when one process holds all.

    They are counted in float32. The optimizer has `slots` tensors of state for each parameter. With
    `averages`, there is an average of the online encoder.
    """
    trained, moved, encoder = (
        sum(p.numel() for p in part.parameters()) for part in (online, target, online.encoder)
    )
    return 4 * (trained * (2 + slots) + moved + averages * encoder)


def choose(
    config: ParallelConfig, world: World, needed: int, report: Callable[[str], None]
) -> Strategy:
    """Choose the strategy of a run, the same on all processes, which call it together.

    Args:
        needed: `state_bytes` of the networks.
        report: Called with a line about the choice that auto makes.

    Raises InputError when the processes do not allow the strategy of the recipe.
    """
    sizes, memories = zip(
        *world.all_gather_object((world.local_size, _memory(world.device))), strict=True
    )
    machine = sizes[0] if len(set(sizes)) == 1 else 0  # 0 where the machines differ in that
    check_groups(config, world.size, machine)
    if config.strategy == "auto":
        chosen: Strategy = "none"
        if world.size > 1:
            least = min(memories)
            if least and needed > least / 2:
                chosen = "hsdp" if 1 < machine < world.size else "fsdp"
            else:
                chosen = "ddp"
            report(
                f"strategy {chosen}: networks and optimizer take {needed / 2**30:.2f} GiB"
                + (f" of {least / 2**30:.0f}" if least else "")
            )
        return chosen
    return config.strategy


def check_groups(config: ParallelConfig, processes: int, machine: int) -> None:
    """Raise InputError when that many processes do not allow the strategy of the recipe.

    `machine` is the number of those on each machine, or 0 where the machines differ in that.
    """
    if config.strategy != "hsdp":
        if config.shard:
            raise InputError(
                f"parallel.shard {config.shard} is for hsdp: give --parallel.strategy hsdp too"
            )
        return
    shard = config.shard or machine
    if not shard:
        raise InputError(
            "parallel.strategy hsdp: the machines have different numbers of processes: give "
            "--parallel.shard"
        )
    if not (1 < shard < processes and processes % shard == 0):
        fit = [n for n in range(2, processes) if processes % n == 0]
        mend = f"use --parallel.shard {fit[-1]}" if fit else "use --parallel.strategy fsdp"
        raise InputError(
            f"parallel.strategy hsdp: {processes} process{'es' * (processes > 1)} cannot form two "
            f"or more groups of {shard}, with at least two processes in each: {mend}"
        )


def _memory(device: torch.device) -> int:
    """Return the bytes of a GPU; 0 for a CPU, which has what all its processes share."""
    cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if cuda else 0


def parallelize(
    online: Online,
    target: Target,
    config: ParallelConfig,
    strategy: Strategy,
    world: World,
    *,
    compile: bool,
    static: bool,
) -> Parallel:
    """Spread both networks over the processes, in place, in this order:

    1. The batch norms take their statistics over all processes.
    2. The blocks of the online network recompute their activations, when the recipe asks for it.
       The target keeps no activations.
    3. The regions are compiled before anything wraps them. A graph includes the communication of
       its batch norms, but no hooks of DDP or FSDP.
    4. FSDP2 shards both networks alike, block by block, so that the moving average needs no
       communication. Or DDP wraps the online network.

    Args:
        compile: Compile the regions.
        static: Every step takes the same path (no accumulation), which DDP can rely on.
    """
    if world.size > 1:
        for network in (online, target):
            synchronize(network, cast(ProcessGroup, dist.group.WORLD))
    if config.recompute:
        for block in online.encoder.blocks():
            _recompute(block)
    if compile:
        compile_networks(online, target)
    if strategy == "none":
        return Parallel(strategy, online, None, [], online)
    if strategy == "ddp":
        return Parallel(strategy, _ddp(online, static), None, [], online)
    # Some blocks return views, such as ShuffleNet's. No network changes a block's output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = _mesh(strategy, config, world)
    for network in (online, target):
        for block in network.encoder.blocks():
            fully_shard(block, mesh=mesh)
        # The backward pass frees the online network's outermost parameters again. The target
        # has none, so its forward pass has to.
        fully_shard(network, mesh=mesh, reshard_after_forward=True if network is target else None)
    groups = mesh.get_all_groups()
    return Parallel(strategy, online, groups[-1], groups, online)


def _ddp(online: Online, static: bool) -> DistributedDataParallel:
    # The warning is harmless: a 1x1 convolution's gradient may have the strides of channels_last,
    # which for that shape is the same order in memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch renames broadcast_buffers
        ddp = DistributedDataParallel(
            online,
            broadcast_buffers=False,  # running statistics are equal by construction
            gradient_as_bucket_view=True,
            static_graph=static,
        )
    if dist.get_backend() != "fake":  # a plan's stand-in for other processes adds up nothing
        _lay_out_buckets(ddp, online)
    return ddp


def _lay_out_buckets(ddp: DistributedDataParallel, online: Online) -> None:
    """Let DDP lay out its buckets of gradients by backward passes of zeros.

    DDP lays them out anew after its first backward pass, or after its second one if the graph is
    static, in the order in which gradients come. Three processes or more add up in an order that
    depends on a gradient's place in its bucket. So the first step of a start would differ in its
    last bits from the same step of a run that was never stopped.
    """

    def visit() -> Tensor:  # its backward pass goes from the last parameter to the first
        return torch.stack([p.sum() for p in online.parameters()]).sum() * 0

    vars(online)["forward"] = visit
    for _ in range(2):
        ddp().backward()
    del vars(online)["forward"]
    ddp.zero_grad()


def _mesh(strategy: Strategy, config: ParallelConfig, world: World) -> DeviceMesh:
    if strategy == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shard = config.shard or world.local_size
    shape, names = (world.size // shard, shard), ("replicate", "shard")
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def _recompute(block: nn.Module) -> None:
    """Keep for the backward pass only the block's input and the all-reduced sums of its norms."""
    forward = block.forward
    kept = partial(create_selective_checkpoint_contexts, _keep_communicated)

    def again(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(
            forward, x, use_reentrant=False, preserve_rng_state=False, context_fn=kept
        )
        return y

    block.forward = again


def _keep_communicated(_: object, operation: Any, *__: object, **___: object) -> CheckpointPolicy:
    if operation is torch.ops._c10d_functional.all_reduce.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
