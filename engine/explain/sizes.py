"""Find what a step costs without taking one: parameters, bytes in memory and operations.

The networks are built of torch's fake tensors, which have a shape and a storage of some size, but
no memory. A step on them creates and drops the same tensors as a real step does, and these are
counted.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from engine.method.average import Average
from engine.method.byol import VIEWS, Online, Target, update_target
from engine.method.head import whole_loss
from engine.method.precision import StepGuard, autocast, parameter_dtype
from engine.processes import parallel
from engine.processes.world import World
from engine.recipe import Recipe

LEAST = 2  # images: a process with one has norm statistics only together with others
_CPU = torch.device("cpu")
_ALONE = World(0, 1, 1, _CPU)


class StepCost(NamedTuple):
    """What a process's forward and backward passes of one micro-batch take."""

    kept: int  # bytes that the forward pass of the online network keeps for the backward pass
    peak: int  # most bytes at one time, without parameters, gradients and optimizer
    operations: int  # of floating-point numbers; multiply-add is two; 0 when blocks are recomputed


class Fakes:
    """Hold the networks and the optimizer of a recipe, made of fake tensors."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        """Build them. `classes` is the number of classes of data.train."""
        self.recipe, self._mode = recipe, FakeTensorMode()
        size, default = recipe.views.size, _default(parameter_dtype(recipe.precision))
        # Some networks look at the weights that they draw, and fake ones have no values. On the
        # meta device nothing is drawn.
        with torch.device("meta"), default:
            self.online = Online(recipe.model, classes, size)
            self.target = Target(recipe.model, size)
        with self._mode, _default(parameter_dtype(recipe.precision)):
            for network in (self.online, self.target):
                network._apply(lambda held: torch.empty(held.shape, dtype=held.dtype))
            optimizer: torch.optim.Optimizer = recipe.optimizer.build(self.online)
            guard = StepGuard(recipe.precision, _CPU, recipe.batch.size, 1)
            average = Average(recipe.average, self.online.encoder, update_target)
        self.optimizer = _bytes(tree_leaves(list(optimizer.state.values())))
        """The bytes of the optimizer's state."""
        self.temporary = measure_temporary(recipe)
        """What a step of the optimizer takes for a moment, in units of the parameters' bytes."""
        self.buffers = _bytes([*self.online.buffers(), *self.target.buffers()])
        """The bytes of what the networks hold beside their parameters."""
        saved = [network.state_dict() for network in (self.online, self.target)]
        saved += [guard.state(), average.state()]
        self.checkpoint = _bytes(tree_leaves(saved)) + self.optimizer
        """The bytes of the tensors of a checkpoint."""

    def parts(self) -> dict[str, int]:
        """Return the number of parameters of each part of the networks, by name."""
        found = {f"online {name}": count(part) for name, part in self.online.named_children()}
        return found | {
            f"target {name}": count(part) for name, part in self.target.named_children()
        }

    def measure_step(self, rows: int, *, recompute: bool) -> StepCost:
        """Count what a micro-batch of `rows` images of one process takes, in eager mode.

        With `recompute`, blocks are computed again in the backward pass. At least LEAST images are
        taken.
        """
        recipe, size = self.recipe, self.recipe.views.size
        rows = max(rows, LEAST)
        config = parallel.ParallelConfig(recompute=recompute)
        dtype = parameter_dtype(recipe.precision)
        fresh = Fakes(recipe, self.classes) if recompute else self  # recomputing changes blocks
        with fresh._mode:
            spread = parallel.parallelize(
                *(fresh.online, fresh.target, config, "none", _ALONE), compile=False, static=True
            )
            held: list[Tensor] = []
            for network in (fresh.online, fresh.target):
                held += [*network.parameters(), *network.buffers()]
            for parameter in fresh.online.parameters():
                parameter.grad = torch.empty_like(parameter)
                held.append(parameter.grad)
            live = LiveBytes(held)
            counter = FlopCounterMode(display=False)
            # Under the counter, recomputed blocks hold their tensors for longer than they do alone.
            with nullcontext() if recompute else counter, live:
                images = torch.empty(VIEWS * rows, 3, size, size, dtype=dtype)
                labels = torch.zeros(rows, dtype=torch.int64)
                with autocast(recipe.precision, _CPU):
                    with torch.no_grad():
                        projection = fresh.target(images)
                    output = spread.online(images)
                    kept = live.now
                whole_loss(output, projection, labels).backward()
        return StepCost(kept, live.peak, counter.get_total_flops())

    @property
    def classes(self) -> int:
        """Return the number of classes that the online classifier tells apart, or 0."""
        return 0 if self.online.classifier is None else len(self.online.classifier.weight)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors that are made while it is entered and still exist.

    `now` is their number, and `peak` is the largest that it has been. It works on fake tensors and
    on real ones. Tensors that share memory count once.
    """

    def __init__(self, without: Iterable[Tensor]) -> None:
        """Start to count. The memory of the tensors `without` never counts."""
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in without:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None and known() is not None:
            return

        def drop(_: object) -> None:
            self.now -= size
            self._known.pop(key, None)

        self.now += size
        self.peak = max(self.peak, self.now)
        self._known[key] = weakref.ref(storage, drop)


def measure_temporary(recipe: Recipe) -> float:
    """Return the bytes that a step of the optimizer takes for a moment, per byte of parameters.

    A step of small layers is taken for it. Of torch's optimizers that have no kernel that skips a
    step, it includes the copies of parameters and state, and what torch makes when it works on all
    tensors at once, as it does on GPUs.
    """
    network = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
    optimizer: Any = recipe.optimizer.build(network)
    for group in optimizer.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = True
    held = [*network.parameters(), *tree_leaves(list(optimizer.state.values()))]
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
        held.append(parameter.grad)
    live = LiveBytes(value for value in held if isinstance(value, Tensor))
    with live:
        optimizer.step(None, recipe.clip)
    return live.peak / _bytes(network.parameters())


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Let new tensors have this dtype. Fake parameters cannot be converted later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def count(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
