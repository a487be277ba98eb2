"""LARS: momentum SGD for large batches, which also works on sharded parameters.

Source: You et al., "Large batch training of convolutional networks" (arXiv 1708.03888);
BYOL (arXiv 2006.07733), "Implementation details: Optimization".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from engine.method.adaptation import adapted_directions
from engine.method.clipping import OFF, ClipConfig
from engine.method.local_shards import local
from engine.method.optimizer import Optimizer, parameter_groups, with_gradients


class LARS(Optimizer):
    """Momentum SGD in which every weight tensor moves at a rate in proportion to its own norm.

        u = g + weight_decay * p
        u *= trust_coefficient * |p| / |u|    in groups with `adapt`, where both norms are > 0
        m = momentum * m + u
        p -= lr * m

    The groups are those of `parameter_groups`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        momentum: float,
        weight_decay: float,
        trust_coefficient: float,
        shard_group: ProcessGroup | None = None,
    ) -> None:
        """Create the optimizer state. `shard_group` is that of `Optimizer`."""
        defaults = {
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(groups, defaults, shard_group)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, scale: Tensor | None = None, clip: ClipConfig = OFF
    ) -> Tensor:
        moved = with_gradients(self.param_groups)
        updates, skip = adapted_directions(moved, scale, clip, self.shard_group)
        for (group, parameters), own in zip(moved, updates, strict=True):
            momenta = local(self.state[p]["momentum_buffer"] for p in parameters)
            torch._fused_sgd_(
                local(parameters),
                own,
                momenta if group["momentum"] else [],  # the kernel refuses what it does not use
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=0.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=skip,
            )
        return skip


@dataclass(frozen=True)
class LARSConfig:
    """Configure LARS; the defaults are the paper's for 1000 epochs.

    For shorter trainings the paper uses a weight decay of 1e-6.
    """

    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Fraction of the previous step's direction that is kept."""

    weight_decay: Annotated[float, Interval(ge=0, le=1e9)] = 1.5e-6
    """Strength of the weight decay. Biases and norm parameters have none."""

    trust_coefficient: Annotated[float, Interval(gt=0, le=1e9)] = 1e-3
    """Length of a weight's update, before momentum and the learning rate, as a fraction of the
    weight's own length."""

    slots: ClassVar[int] = 1  # tensors of state for each parameter

    def build(self, module: nn.Module, shard_group: ProcessGroup | None = None) -> LARS:
        """Build LARS for the parameters of `module`, at learning rate 0."""
        return LARS(
            parameter_groups(module),
            self.momentum,
            self.weight_decay,
            self.trust_coefficient,
            shard_group,
        )
