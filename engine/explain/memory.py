"""Find the memory that one process needs, by the strategy that spreads a step over processes."""

from typing import NamedTuple

from torch import Tensor, nn

from engine.explain.sizes import Fakes, StepCost
from engine.processes.parallel import Strategy
from shards.loader import BATCHES_AHEAD
from shards.loader_process import AHEAD


class Held(NamedTuple):
    """The bytes that a process holds all the time, or from the backward pass to the optimizer.

    The last two are there for a moment only.
    """

    parameters: int
    gradients: int
    optimizer: int
    target: int
    average: int  # of the online encoder; 0 when none is kept
    gathered: int  # of parameters and gradients of other processes, which are whole for a moment
    update: int  # of what the optimizer or the target's moving average makes for a moment

    @property
    def state(self) -> int:
        """Return the bytes of parameters, gradients, optimizer, target and average."""
        return self.parameters + self.gradients + self.optimizer + self.target + self.average


def hold(fakes: Fakes, shards: int) -> Held:
    """Return what the first process holds when `shards` processes share out the rows.

    The first process has the largest part.
    """
    online, target = (_part(network, shards) for network in (fakes.online, fakes.target))
    slots = fakes.recipe.optimizer.slots
    # The optimizer's other tensors are one number for each parameter, which are never shared out.
    single = fakes.optimizer - slots * _part(fakes.online, 1)
    optimizer = slots * online + single
    encoder = fakes.online.encoder if fakes.recipe.average.rate else nn.Identity()
    average = _part(encoder, shards) + sum(value.nbytes for value in _statistics(encoder))
    gathered, update = _whole(fakes, shards), max(target, round(online * fakes.temporary))
    return Held(online, online, optimizer, target + fakes.buffers, average, gathered, update)


def _statistics(module: nn.Module) -> list[Tensor]:
    """Return the running statistics, which every process has as a whole."""
    saved = module.state_dict()
    return [b for name, b in module.named_buffers() if name in saved and b.is_floating_point()]


def _part(module: nn.Module, shards: int) -> int:
    """Return the bytes of the rows of all parameters that the first of `shards` processes has."""
    return sum(
        -(-len(p) // shards) * (p.numel() // len(p)) * p.element_size() for p in module.parameters()
    )


def _whole(fakes: Fakes, shards: int) -> int:
    """Return the most bytes that are gathered at one time, by an estimate.

    The online network's outermost parameters stay whole from its forward to its backward pass.
    Beside them there are two blocks: the one that computes and the one that is fetched next.
    """
    if shards == 1:
        return 0
    blocks = [_part(block, 1) for block in fakes.online.encoder.blocks()]
    outermost = _part(fakes.online, 1) - sum(blocks)
    return 2 * (outermost + sum(sorted(blocks)[-2:]))  # parameters, and gradients of this size


def strategies(processes: int, shard: int) -> dict[Strategy, int]:
    """Return the strategies that `processes` can use, each with how many share out the rows.

    `shard` is the number of processes in a group of hsdp.
    """
    if processes == 1:
        return {"none": 1}
    found: dict[Strategy, int] = {"ddp": 1, "fsdp": processes}
    if 1 < shard < processes and processes % shard == 0:
        found["hsdp"] = shard
    return found


def need(held: Held, step: StepCost, views: int) -> int:
    """Return the bytes that a process needs on its device in a step, in eager mode.

    `views` is the bytes of its uint8 views of a batch.
    """
    # The optimizer makes its updates when the activations are gone.
    return held.state + held.gathered + max(step.peak, held.update) + views


def host_views(views: int, own_process: bool) -> int:
    """Return the bytes of views that wait in host memory, of which `views` are in a batch.

    `own_process` says whether the loader works in a process of its own.
    """
    return views * (BATCHES_AHEAD + 1 + (AHEAD + 1) * own_process)
