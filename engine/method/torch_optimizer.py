"""Any optimizer of torch.optim, on this process's shards, with LARS's adaptation if it is asked."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from engine.method.adaptation import adapted_directions
from engine.method.clipping import OFF, ClipConfig, clip_gradients
from engine.method.local_shards import local, local_gradients
from engine.method.optimizer import Moved, Optimizer, parameter_groups, with_gradients
from engine.method.torch_options import (
    ELEMENTWISE,
    find_optimizer,
    read_options,
    try_options,
)
from shards.errors import InputError

_SKIPPING = ("Adagrad", "Adam", "AdamW", "SGD")  # Their fused kernels can skip a step.
_FROM_RATE = {"ASGD": "eta", "Rprop": "step_size"}  # state that begins as the first step's rate


class TorchOptimizer(Optimizer):
    """An optimizer of torch.optim.

    With `adapt` it does not get the gradients g, but in their place

        u = g + weight_decay * p
        u *= trust_coefficient * |p| / |u|    for weights, where both norms are > 0

    and no weight decay of its own, whether that would be decoupled or not. For biases and norm
    parameters u is g. Without `adapt` it gets the gradients and its own weight decay.

    Torch has fused kernels of some optimizers that skip a step. Of the others the step is taken and
    undone, for which it copies parameters and state. The device is waited for in Adafactor's steps
    alone, in which torch reads norms on the host.
    """

    def __init__(
        self,
        kind: type[torch.optim.Optimizer],
        options: dict[str, Any],
        groups: Iterable[dict[str, Any]],
        shard_group: ProcessGroup | None = None,
    ) -> None:
        """Create the optimizer state.

        Args:
            kind: A class of torch.optim.
            options: Arguments of the class.
            groups: Have `params`, `weight_decay`, and `trust_coefficient` where LARS's adaptation
                is wanted, with `adapt` for those whose rates it adapts.
            shard_group: That of `Optimizer`.
        """
        groups = list(groups)
        self._kind, self._stock = kind, self._make_stock(kind, options, groups)
        super().__init__(groups, self._stock.defaults, shard_group)
        self._adapts = "trust_coefficient" in self.param_groups[0]
        self._skips = bool(self._stock.defaults.get("fused"))
        self._make_state()

    @staticmethod
    def _make_stock(
        kind: type[torch.optim.Optimizer], options: dict[str, Any], groups: list[dict[str, Any]]
    ) -> Any:
        """Return torch's optimizer, which computes the steps and borrows tensors for each of them.

        Its counters of steps are on the parameters' device, except for Adafactor's, and Adagrad's
        where torch has no kernel that skips.
        """
        device = next(p.device for group in groups for p in group["params"])
        arguments = signature(kind).parameters
        own: dict[str, Any] = {}
        if can_skip(kind, device):
            own["fused"] = True
        elif "capturable" in arguments:
            own["capturable"] = device.type == "cuda"
        stock: Any = kind([torch.zeros((), device=device)], lr=0.0, **own, **options)  # type: ignore[call-arg]
        # Torch would warn that a step is not captured in a CUDA graph.
        stock._warned_capturable_if_run_uncaptured = True
        return stock

    @torch.no_grad()
    def _make_state(self) -> None:
        """Make the state that torch makes in the first step."""
        moved: Moved = [(group, group["params"]) for group in self.param_groups]
        views = self._lend(moved, [local(parameters) for _, parameters in moved])
        for view in views.values():
            self._stock.state[view] |= self._state_made_elsewhere(view)
        begin = self._stock._init_group
        lists = len(signature(begin).parameters) - 1
        for group in self._stock.param_groups:
            begin(group, *([] for _ in range(lists)))
        for p, view in views.items():
            for key, value in self._stock.state[view].items():
                self.state[p][key] = _like(p, view, value if key == "step" else value.to(p.dtype))
        self._take_back()

    def _state_made_elsewhere(self, view: Tensor) -> dict[str, Tensor]:
        """Make the state that torch does not make where it makes all other.

        SGD's is made of the first gradient. Adagrad's is made with the optimizer up to torch 2.11.
        """
        if self._kind.__name__ == "SGD":
            return {"momentum_buffer": torch.zeros_like(view)}
        if self._kind.__name__ == "Adagrad":
            step = torch.zeros((), device=view.device if self._skips else None)
            first = self.defaults["initial_accumulator_value"]
            return {"step": step, "sum": torch.full_like(view, first)}
        return {}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, scale: Tensor | None = None, clip: ClipConfig = OFF
    ) -> Tensor:
        moved = with_gradients(self.param_groups)
        updates, skip = self._updates(moved, scale, clip)
        views = self._lend(moved, updates)
        lent = [*views.values(), *(v for view in views.values() for v in self._state_of(view))]
        kept = [] if self._skips else [(t, t.clone()) for t in lent if t.device == skip.device]
        self._start_from_rate()
        if self._skips:
            self._stock.found_inf = skip
        self._stock.step()
        for tensor, before in kept:
            tensor.copy_(torch.where(skip > 0, before, tensor))
        self._take_back()
        return skip

    def _updates(
        self, moved: Moved, scale: Tensor | None, clip: ClipConfig
    ) -> tuple[list[list[Tensor]], Tensor]:
        """Return what enters torch's optimizer in place of the gradients, and whether to skip."""
        if self._adapts:
            return adapted_directions(moved, scale, clip, self.shard_group)
        updates = [local_gradients(parameters) for _, parameters in moved]
        grads = sum(updates, list[Tensor]())
        skip, scale = clip_gradients(grads, scale, clip, self.shard_group)
        if scale is not None:
            torch._foreach_div_(grads, scale)
        return updates, skip

    def _lend(self, moved: Moved, updates: list[list[Tensor]]) -> dict[Tensor, Tensor]:
        """Lend torch's optimizer this process's parts of parameters, updates and state.

        FSDP2 may move the memory of a shard, so they are looked up in every step.

        Returns:
            For each parameter the view that was lent, which shares its memory.
        """
        views: dict[Tensor, Tensor] = {}
        self._stock.param_groups, self._stock.state = [], defaultdict(dict)
        for (group, parameters), own in zip(moved, updates, strict=True):
            for p, update in zip(parameters, own, strict=True):
                (part,) = local([p])
                view = views[p] = part.detach()
                view.grad = update
                state = self.state[p]
                values = local(state.values())
                self._stock.state[view] = dict(zip(state, values, strict=True))
            decay = {"weight_decay": 0.0} if self._adapts else {}
            lent = {**group, **decay, "params": [views[p] for p in parameters]}
            self._stock.param_groups.append(lent)
        return views

    def _take_back(self) -> None:
        self._stock.param_groups, self._stock.state = [], defaultdict(dict)

    def _state_of(self, view: Tensor) -> list[Tensor]:
        return list(self._stock.state[view].values())

    def _start_from_rate(self) -> None:
        """Begin some state as the rate of the first step, as torch does, now that it is known."""
        key = _FROM_RATE.get(self._kind.__name__)
        if key is None:
            return
        for group in self._stock.param_groups:
            for view in group["params"]:
                state = self._stock.state[view]
                state[key].copy_(torch.where(state["step"] > 0, state[key], group["lr"]))


def can_skip(kind: type[torch.optim.Optimizer], device: torch.device) -> bool:
    """Return whether torch has a kernel of the optimizer for the device that can skip a step.

    Adagrad's kernel for GPUs came after torch 2.11.
    """
    if kind.__name__ not in _SKIPPING or device.type == "cpu":
        return kind.__name__ in _SKIPPING
    weight = torch.zeros(1, device=device, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    try:
        kind([weight], lr=0.0, fused=True).step()  # type: ignore[call-arg]
    except RuntimeError:
        return False
    return True


def _like(p: Tensor, view: Tensor, value: Tensor) -> Tensor:
    """Return state of this process's part of `p`; it is spread as `p` is if it has its shape."""
    if not isinstance(p, DTensor) or value.shape != view.shape:
        return value
    spread = torch.zeros_like(p)
    local([spread])[0].copy_(value)
    return spread


@dataclass(frozen=True)
class TorchOptimizerConfig:
    """Configure any optimizer of torch.optim, with LARS's adaptation around it if it is wanted."""

    name: str = "Adam"
    """Name of the class in torch.optim, such as RMSprop. LBFGS, SparseAdam and Muon cannot be used,
    and Adafactor only where each process holds whole tensors."""

    options: tuple[str, ...] = ()
    """Arguments of the class, each as KEY=VALUE, such as alpha=0.9 or betas=(0.9,0.99). What is
    left out has torch's default. Learning rate and weight decay are not among them."""

    weight_decay: Annotated[float, Interval(ge=0, le=1e9)] = 0.0
    """Strength of the weight decay, as the class applies it. Biases and norm parameters have
    none."""

    adapt: bool = False
    """Scale what enters the optimizer as LARS does: the gradient of a weight, plus weight_decay
    times the weight, gets a length in proportion to the weight's own."""

    trust_coefficient: Annotated[float, Interval(gt=0, le=1e9)] = 1e-3
    """Length of what enters the optimizer as a fraction of the weight's own length, with adapt."""

    @property
    def slots(self) -> int:
        """Return the number of tensors of state for each parameter that have its shape."""
        weight = nn.Parameter(torch.zeros(2, 3))
        state = self._build([{"params": [weight], "weight_decay": 0.0}]).state[weight]
        return sum(value.shape == weight.shape for value in state.values())

    def check(self, spread: bool) -> None:
        """Raise InputError, naming the field, when the optimizer cannot be built.

        `spread` tells that processes share out the parameters.
        """
        try_options(self.name, read_options(self.name, self.options))
        arguments = signature(find_optimizer(self.name)).parameters
        if self.weight_decay and not self.adapt and "weight_decay" not in arguments:
            raise InputError(
                f"optimizer.weight_decay {self.weight_decay}: {self.name} has none: set it to 0"
            )
        if spread and self.name not in ELEMENTWISE:
            raise InputError(
                f"optimizer.name {self.name}: looks at whole tensors, which fsdp and hsdp spread "
                "over processes: use --parallel.strategy ddp"
            )

    def build(self, module: nn.Module, shard_group: ProcessGroup | None = None) -> TorchOptimizer:
        """Build the optimizer for the parameters of `module`, at learning rate 0."""
        if shard_group is not None:
            self.check(spread=True)
        trust = {"trust_coefficient": self.trust_coefficient} if self.adapt else {}
        groups = [
            {"weight_decay": self.weight_decay, **trust, **group}
            for group in parameter_groups(module)
        ]
        return self._build(groups, shard_group)

    def _build(
        self, groups: list[dict[str, Any]], shard_group: ProcessGroup | None = None
    ) -> TorchOptimizer:
        options = read_options(self.name, self.options)
        return TorchOptimizer(find_optimizer(self.name), options, groups, shard_group)
