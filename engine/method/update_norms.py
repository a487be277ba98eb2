"""Measure how large the gradient of a step is, and how far the step moves the weights."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from engine.method.local_shards import foreach_norms, local, local_gradients


class UpdateNorms:
    """Measure some of an optimizer's steps, by hooks that do nothing in the others.

    The gradient is the averaged one of the global batch, without the loss scale. The weights are
    the parameters of more than one dimension. All norms are L2 norms of the whole network. They
    stay on the device until `read`, so that a step never waits for it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, network: nn.Module, shard_group: ProcessGroup | None
    ) -> None:
        """Set the hooks.

        `shard_group` is the processes that the parameters are spread over, None when each process
        holds them all.
        """
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._weights = [p for p in self._parameters if p.ndim > 1]
        self._group = shard_group
        self._wanted = False
        self._before: list[Tensor] = []
        self._gradient: Tensor | None = None  # [] float64, squared
        self._squares: Tensor | None = None  # [3] float64: gradient, change, weights
        optimizer.register_step_pre_hook(self._look_before)
        optimizer.register_step_post_hook(self._look_after)

    @contextmanager
    def measuring(self, wanted: bool) -> Iterator[None]:
        """Measure the step that is taken in this block, if it is wanted."""
        self._wanted, self._squares = wanted, None
        try:
            yield
        finally:
            self._wanted = False

    def read(self) -> dict[str, float | None]:
        """Return the figures of the step that was measured last, the same on all processes.

        A figure is None when it is not finite. There are none when the step was not measured. In
        a step that was skipped the weights have not moved, and `update_ratio` is 0.
        """
        if self._squares is None:
            return {}
        gradient, change, weights = (math.sqrt(value) for value in self._squares.tolist())
        ratio = change / weights if weights else math.nan
        return {"grad_norm": finite_or_none(gradient), "update_ratio": finite_or_none(ratio)}

    @torch.no_grad()
    def _look_before(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._wanted:
            return
        scale = args[1] if len(args) > 1 else kwargs.get("scale")  # args[0] is the optimizer
        squares = _square(local_gradients(self._parameters))
        self._gradient = squares if scale is None else squares / scale.double().square()
        self._before = [weight.clone() for weight in local(self._weights)]

    @torch.no_grad()
    def _look_after(self, *_: object) -> None:
        if not self._wanted or self._gradient is None:
            return
        weights = _square(self._before)
        change = _square(torch._foreach_sub(local(self._weights), self._before))
        squares = torch.stack([self._gradient, change, weights])
        if self._group is not None:
            dist.all_reduce(squares, group=self._group)
        self._squares = squares
        self._before, self._gradient = [], None  # so that the copies take no memory between steps


def _square(tensors: Iterable[Tensor]) -> Tensor:
    """Compute the square of the norm of all tensors together: [] float64."""
    return foreach_norms(list(tensors)).double().square().sum()


def finite_or_none(value: float) -> float | None:
    """Return a figure, or None in place of one that JSON cannot hold."""
    return value if math.isfinite(value) else None
