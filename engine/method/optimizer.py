"""What all optimizers here share: how the trainer calls them, and the groups of parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from engine.method.clipping import OFF, ClipConfig

Moved = list[tuple[dict[str, Any], list[Tensor]]]  # groups, each with its parameters that move


class Optimizer(torch.optim.Optimizer):
    """An optimizer with which all processes skip a step together, when it is not finite.

    `lr` starts at 0, and the trainer sets it in each group before a step. The state exists from
    the start, so that a checkpoint can be loaded into it. A step does not wait for the device.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        shard_group: ProcessGroup | None,
    ) -> None:
        """Take the groups of parameters, and the options of those that have none of their own.

        `shard_group` is the processes that the parameters are spread over, None when each process
        holds them all.
        """
        super().__init__(groups, {"lr": 0.0, **defaults})
        self.shard_group = shard_group

    def step(  # type: ignore[override]
        self, scale: Tensor | None = None, clip: ClipConfig = OFF
    ) -> Tensor:
        """Move every parameter that has a gradient, or none when some gradient is not finite.

        Args:
            scale: [] float32, divides the gradients. None leaves them as they are.
            clip: How gradients are clipped after that. They are changed in place then.

        Returns:
            [] float32, 1 when the step was skipped and else 0, the same on all processes.
        """
        raise NotImplementedError


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return one group with the weights of `module`, one with its biases and norm parameters.

    The weights are all parameters of 2 or 4 dimensions: those of linear layers [O, I] and of
    convolutions [O, I, H, W], and the tables of relative positions [P, heads] of torchvision's Swin
    and MaxViT. The second group holds all others. In torchvision's networks these are also class
    tokens [1, 1, D], position embeddings [1, N, D], and scales [D, 1, 1]. It has no weight decay,
    and LARS does not adapt its rates.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    weights = [p for p in parameters if p.ndim in (2, 4)]
    others = [p for p in parameters if p.ndim not in (2, 4)]
    return [
        {"params": weights, "adapt": True},
        {"params": others, "adapt": False, "weight_decay": 0.0},
    ]


def with_gradients(groups: list[dict[str, Any]]) -> Moved:
    """Return the groups of an optimizer that have parameters with a gradient, and these."""
    found = [(group, [p for p in group["params"] if p.grad is not None]) for group in groups]
    return [(group, parameters) for group, parameters in found if parameters]
