"""AdamW, for small batches and small networks, by torch's fused kernels on this process's shards.

Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.adamw import adamw

from engine.method.clipping import OFF, ClipConfig, clip_gradients
from engine.method.local_shards import local, local_gradients
from engine.method.optimizer import Optimizer, parameter_groups, with_gradients


class AdamW(Optimizer):
    """AdamW as in torch.optim."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        weight_decay: float,
        shard_group: ProcessGroup | None = None,
    ) -> None:
        """Create the optimizer state. `shard_group` is that of `Optimizer`."""
        super().__init__(groups, {"betas": betas, "weight_decay": weight_decay}, shard_group)
        for group in self.param_groups:
            for p in group["params"]:
                state = {"step": torch.zeros((), device=p.device)}
                state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p] = state

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, scale: Tensor | None = None, clip: ClipConfig = OFF
    ) -> Tensor:
        moved = with_gradients(self.param_groups)
        grads = local_gradients(p for _, parameters in moved for p in parameters)
        skip, scale = clip_gradients(grads, scale, clip, self.shard_group)
        for group, parameters in moved:
            states = [self.state[p] for p in parameters]
            beta1, beta2 = group["betas"]
            # torch.optim.AdamW calls the same function, but on DTensors, whose dispatch takes
            # longer than the step itself.
            adamw(
                local(parameters),
                local_gradients(parameters),
                local(state["exp_avg"] for state in states),
                local(state["exp_avg_sq"] for state in states),
                [],
                [state["step"] for state in states],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=1e-8,
                amsgrad=False,
                maximize=False,
                fused=True,
                grad_scale=scale,
                found_inf=skip,
            )
        return skip


@dataclass(frozen=True)
class AdamWConfig:
    """Configure AdamW, for small batches and small networks."""

    weight_decay: Annotated[float, Interval(ge=0, le=1e9)] = 1e-2
    """Strength of the weight decay. Biases and norm parameters have none."""

    betas: Annotated[tuple[float, float], Interval(ge=0, lt=1)] = (0.9, 0.999)
    """Decay rates of the gradient's running mean and running square."""

    slots: ClassVar[int] = 2  # tensors of state for each parameter

    def build(self, module: nn.Module, shard_group: ProcessGroup | None = None) -> AdamW:
        """Build AdamW for the parameters of `module`, at learning rate 0."""
        return AdamW(parameter_groups(module), self.betas, self.weight_decay, shard_group)
