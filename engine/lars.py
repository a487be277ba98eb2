"""The optimizers: LARS for large batches, AdamW for small runs.

Source: You et al., "Large batch training of convolutional networks" (arXiv 1708.03888);
BYOL (arXiv 2006.07733), "Implementation details: Optimization".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The weights of `module`, then its biases and norm parameters (all of at most one dimension).

    The latter are neither decayed nor adapted.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "adapt": False, "weight_decay": 0.0},
    ]


class LARS(torch.optim.Optimizer):
    """Momentum SGD in which every weight tensor moves at a rate in proportion to its own norm.

        u = g + weight_decay * p
        u *= trust_coefficient * |p| / |u|    in groups with `adapt`, where both norms are > 0
        m = momentum * m + u
        p -= lr * m

    `lr` starts at 0: the trainer sets each group's before a step. Momentum exists from the start,
    so that a checkpoint has somewhere to load to. A step never waits for the device.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        momentum: float,
        weight_decay: float,
        trust_coefficient: float,
    ) -> None:
        defaults = {
            "lr": 0.0,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient; there is no closure."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            updates = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            if group["adapt"]:
                ratios = _trust_ratios(params, updates, group["trust_coefficient"])
                torch._foreach_mul_(updates, ratios)
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


def _trust_ratios(
    params: list[Tensor], updates: tuple[Tensor, ...], coefficient: float
) -> list[Tensor]:
    p = torch.stack(torch._foreach_norm(params))  # [tensors]
    u = torch.stack(torch._foreach_norm(updates))
    return list(torch.where((p > 0) & (u > 0), coefficient * p / u, 1.0))


@dataclass(frozen=True)
class LARSConfig:
    """LARS; the defaults are the paper's for 1000 epochs (shorter ones decay by 1e-6)."""

    momentum: float = 0.9
    """Share of the previous steps' direction that is kept."""

    weight_decay: float = 1.5e-6
    """Pull of the weights towards zero; biases and norm parameters have none."""

    trust_coefficient: float = 1e-3
    """Length of a weight's update before momentum, as a share of the weight's own length."""

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """LARS over the parameters of `module`, at learning rate 0."""
        return LARS(
            parameter_groups(module), self.momentum, self.weight_decay, self.trust_coefficient
        )


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW, for small batches and small networks."""

    weight_decay: float = 1e-2
    """Pull of the weights towards zero; biases and norm parameters have none."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Shares kept of the gradient's running mean and running square."""

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """AdamW over the parameters of `module`, at learning rate 0."""
        return torch.optim.AdamW(
            parameter_groups(module),
            lr=0.0,
            betas=self.betas,
            weight_decay=self.weight_decay,
            foreach=True,
        )
