"""Momentum SGD, by torch's fused kernels on this process's shards."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from engine.method.clipping import OFF, ClipConfig, clip_gradients
from engine.method.local_shards import local, local_gradients
from engine.method.optimizer import Optimizer, parameter_groups, with_gradients
from shards.errors import InputError


class SGD(Optimizer):
    """Momentum SGD as in torch.optim.

        u = g + weight_decay * p
        m = momentum * m + u
        p -= lr * m                      or with nesterov: p -= lr * (u + momentum * m)

    The groups are those of `parameter_groups`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        shard_group: ProcessGroup | None = None,
    ) -> None:
        """Create the optimizer state. `shard_group` is that of `Optimizer`."""
        defaults = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(groups, defaults, shard_group)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, scale: Tensor | None = None, clip: ClipConfig = OFF
    ) -> Tensor:
        moved = with_gradients(self.param_groups)
        grads = local_gradients(p for _, parameters in moved for p in parameters)
        skip, scale = clip_gradients(grads, scale, clip, self.shard_group)
        for group, parameters in moved:
            momenta = local(self.state[p]["momentum_buffer"] for p in parameters)
            torch._fused_sgd_(
                local(parameters),
                local_gradients(parameters),
                momenta if group["momentum"] else [],  # the kernel refuses what it does not use
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,
                grad_scale=scale,
                found_inf=skip,
            )
        return skip


@dataclass(frozen=True)
class SGDConfig:
    """Configure momentum SGD, which is LARS without its adaptation."""

    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Fraction of the previous step's direction that is kept."""

    nesterov: bool = False
    """Look ahead along the momentum (Nesterov). The momentum has to be more than 0."""

    weight_decay: Annotated[float, Interval(ge=0, le=1e9)] = 1e-4
    """Strength of the weight decay. Biases and norm parameters have none."""

    slots: ClassVar[int] = 1  # tensors of state for each parameter

    def check(self) -> None:
        """Raise InputError, naming the field, when the fields conflict."""
        if self.nesterov and not self.momentum:
            raise InputError(
                "optimizer.nesterov needs a momentum: give --optimizer.momentum 0.9, or "
                "--optimizer.no-nesterov"
            )

    def build(self, module: nn.Module, shard_group: ProcessGroup | None = None) -> SGD:
        """Build SGD for the parameters of `module`, at learning rate 0."""
        return SGD(
            parameter_groups(module), self.momentum, self.nesterov, self.weight_decay, shard_group
        )
