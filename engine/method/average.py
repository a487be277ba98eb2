"""The average of the online encoder over the steps, for evaluation and export.

It is an exponential moving average, also known as Polyak's, which the training itself never looks
at. BYOL's target is another one: its rate follows the schedule, and the training depends on it.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992);
torch.optim.swa_utils.AveragedModel computes the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from engine.method.local_shards import local

_MOST_LOST = 1e-3  # part of a weight; 0.9999 in float32 has 6e-4
PART = "average"  # the average's name in the state, and of its network in a checkpoint


@dataclass(frozen=True)
class AverageConfig:
    """Configure the average of the online encoder, which evaluations and exports may take."""

    rate: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Part of the average that stays in each update, such as 0.999: average = rate * average +
    (1 - rate) * online. It begins with the online encoder's first weights. launch/evaluate.py and
    launch/export.py take it by --network average. 0 keeps none. In float32 a weight of the average
    does not follow a difference below about 6e-8 / (1 - rate) of itself: 0.006% at 0.999, and 0.6%
    at 0.99999."""

    def warn(self, dtype: torch.dtype) -> str:
        """Return a line about what this number format leaves out at the rate, or ""."""
        lost = torch.finfo(dtype).eps / 2 / (1 - self.rate)
        if not self.rate or lost < _MOST_LOST:
            return ""
        return (
            f"average.rate {self.rate:g}: in this number format a weight of the average does not "
            f"follow differences below about {lost:.1%} of itself: a rate of 0.9999 follows closer"
        )


class Average:
    """Hold the average of an encoder's parameters and running statistics; nothing at rate 0.

    Running statistics are averaged like parameters. Those of the encoder belong to its newest
    weights, and would not fit the older ones in the average. The counter of the statistics is the
    encoder's own. A part of a sharded parameter is averaged where it lies, so nothing is sent.
    """

    def __init__(
        self,
        config: AverageConfig,
        encoder: nn.Module,
        move: Callable[[list[Tensor], list[Tensor], Tensor], None],
    ) -> None:
        """Begin with the encoder's tensors as they are.

        `move` moves tensors in place towards others by a fraction: see `update_target`.
        """
        self._rate, self._move = config.rate, move
        kept = set(encoder.state_dict()) if config.rate else set()
        tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
        found = {name: tensor for name, tensor in tensors.items() if name in kept}
        self._online = {n: t for n, t in found.items() if t.is_floating_point()}
        self._own = {name: t.detach().clone() for name, t in self._online.items()}
        self._counters = {n: t for n, t in found.items() if n not in self._online}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with the encoder's tensors as they are now."""
        if self._own:
            torch._foreach_copy_(local(self._own.values()), local(self._online.values()))

    def follow(self, skip: Tensor) -> None:
        """Move towards the encoder after its update, unless `skip` [] is 1. No host waits."""
        if self._own:
            own, online = local(self._own.values()), local(self._online.values())
            self._move(own, online, (1 - self._rate) * (1 - skip).to(own[0].dtype))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors to save, by the names of the online network; none at rate 0.

        A checkpoint is loaded into them in place.
        """
        tensors = self._own | self._counters
        return {PART: {f"encoder.{n}": t for n, t in tensors.items()}} if tensors else {}
