"""Batch normalization in which each view has its own statistics, over all processes.

Both views go through the network in one forward pass, but each is normalized by its own
statistics. This matches the official implementation, which has one forward pass for each view.
Statistics over both views together would let each view see the other.

A forward pass leaves its statistics in `batch_mean` and `batch_var`. `RunningStatistics` adds them
to the running statistics after the backward pass. So recomputing a forward pass changes nothing,
and a skipped step leaves no trace.

Source: the official implementation of BYOL (arXiv 2006.07733), which has one forward for each view.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from engine.method.compute_once import compute_once


class BatchNorm(nn.Module):
    """Batch norm of [V*B, C] or [V*B, C, H, W], with the V views stacked first.

    In training each view is normalized by its own mean and biased variance. In evaluation the
    layer does the same as torch's batch norm. Parameters and buffers have torch's names and
    shapes. Statistics and parameters stay in float32 when the input is in half precision.

    With a `group`, the statistics are over the rows of all its processes, which may have different
    numbers of rows. This takes one all-reduce in the forward pass and one in the backward pass,
    for all views together.

    Raises ValueError when the rows cannot be split into the views, or, without a group, when a
    view has a single value per channel.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    batch_mean: Tensor
    batch_var: Tensor

    def __init__(self, channels: int, views: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.views = views
        self.momentum = momentum
        self.eps = eps
        self.group: ProcessGroup | None = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        # These are the mean and the unbiased variance of each view in the last training forward.
        # They are two tensors, because a compiled graph needs a kernel of its own to join them.
        self.register_buffer("batch_mean", torch.zeros(views, channels), persistent=False)
        self.register_buffer("batch_var", torch.zeros(views, channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [V*B, C, ...]; the result has the same shape and dtype."""
        if not self.training:
            return self._normalize(x, self.running_mean, self.running_var)
        if len(x) % self.views:
            raise ValueError(f"{len(x)} rows do not split into {self.views} views")
        # A graph for a GPU is the same with one process as with many. With torch's norm on each
        # view it would have a third more kernels, and each has to be compiled and timed.
        if self.group is not None or (x.is_cuda and torch.compiler.is_compiling()):
            return self._normalize_views(x)
        # Torch's kernels run on each view, and a copy joins the results. On a CPU this is as fast
        # in float32 as `_SyncNorm`, and a quarter faster in bfloat16.
        statistics = self.batch_mean, self.batch_var
        torch._foreach_zero_(statistics)  # momentum 1 multiplies old values by 0: nan would stay
        rows = zip(x.chunk(self.views), *statistics, strict=True)
        normalized = [self._normalize(*view) for view in rows]  # V x [B, C, ...]
        return normalized[0] if self.views == 1 else torch.cat(normalized)

    def _normalize_views(self, x: Tensor) -> Tensor:
        """Normalize all views together, by statistics over all processes of the group, if any."""
        views = x.unflatten(0, (self.views, -1))  # [V, B, C, ...]
        if self.group is None and views[0, :, 0].numel() == 1:
            raise ValueError(f"Expected more than 1 value per channel in a view, got {x.shape}")
        views, mean, variance = _SyncNorm.apply(views, self.weight, self.bias, self.eps, self.group)
        self.batch_mean.copy_(mean)
        self.batch_var.copy_(variance)
        merged: Tensor = views.flatten(0, 1)
        return merged

    def _normalize(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Normalize by the given statistics, or in training by those of x, which replace them."""
        return F.batch_norm(
            x, mean, variance, self.weight, self.bias, self.training, momentum=1.0, eps=self.eps
        )

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, views={self.views}"


class _SyncNorm(torch.autograd.Function):
    """Normalize [V, B, C, ...]; also return each view's mean and unbiased variance, [V, C]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = x[0, :, 0].numel()
        centered, own_mean, own_variance = _centered(x)
        # Moments about zero of several processes merge by a sum. In float64 they do not lose a
        # small variance beside a large mean.
        mean, variance = own_mean.double(), own_variance.double()
        moments = [mean * count, (variance + mean**2) * count, mean.new_full((len(x), 1), count)]
        first, second, total = _sum(moments, group)
        mean = first / total
        variance = (second / total - mean**2).clamp_min(0)
        scale = (variance + eps).rsqrt() * weight
        shift = (own_mean - mean) * scale + bias
        scale, shift = compute_once(scale.to(centered.dtype), shift.to(centered.dtype))
        scale, shift = _like(scale, x), _like(shift, x)
        # Working in place saves memory. But when torch 2.11 compiles this, the backward pass loses
        # the gradient of an output that is not a new tensor: one that was changed in place, or one
        # that `to` returned unchanged.
        into = None if torch.compiler.is_compiling() else centered
        y = torch.addcmul(shift, centered, scale, out=into)
        if y.dtype != x.dtype:
            y = y.to(x.dtype)

        rstd, unbiased = (variance + eps).rsqrt(), variance * total / (total - 1)
        share = torch.ones_like(mean) / total  # [V, C] too, so that the same kernel writes it
        # None of them may be a view, of which torch 2.11 loses the gradients when it compiles this.
        mean, rstd, unbiased, share = (
            figures.to(centered.dtype) for figures in (mean, rstd, unbiased, share)
        )
        ctx.save_for_backward(x, weight, mean, rstd, share)
        ctx.group = group
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, share = ctx.saved_tensors
        dy = dy.to(mean.dtype)
        normalized = (x - _like(mean, x)).mul_(_like(rstd, x))
        sums = [dy.sum(_rows(x)), (dy * normalized).sum(_rows(x))]  # [V, C] each
        # Like every gradient, those of bias and weight are of this process's rows only.
        dbias, dweight = torch.cat(sums, dim=1).sum(0).chunk(2)
        dmean, dscale = compute_once(*(total * share for total in _sum(sums, ctx.group)))
        dx = normalized.mul_(_like(-dscale, x)).add_(dy).sub_(_like(dmean, x))
        dx = dx.mul_(_like(rstd * weight, x))
        return dx.to(x.dtype), dweight, dbias, None, None


def _centered(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the mean of each view and channel from x [V, B, C, ...].

    Returns:
        The centered x, its mean [V, C] and its biased variance [V, C], in float32 or wider.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling():  # the compiler makes it one pass over x
        variance, mean = torch.var_mean(x.to(dtype), _rows(x), correction=0)
        return x - _like(mean, x), mean, variance
    # On a CPU this is ten times as fast as torch.var_mean.
    mean = x.mean(_rows(x), dtype=dtype)
    centered = x - _like(mean, x)
    return centered, mean, centered.square().mean(_rows(x))


def _rows(x: Tensor) -> list[int]:
    """List the dimensions of x [V, B, C, ...] that the statistics are taken over."""
    return [1, *range(3, x.ndim)]


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Reshape [V, C] or [C] to [V or 1, 1, C, ...], which broadcasts with x [V, B, C, ...]."""
    return values.reshape(-1, 1, values.shape[-1], *(1 for _ in x.shape[3:]))


def _sum(values: list[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """Sum each of the values [V, any] over all processes, by one all-reduce.

    It is a functional collective, because torch.compile can trace it.
    """
    if group is None:
        return values
    total = collectives.wait_tensor(collectives.all_reduce(torch.cat(values, dim=1), "sum", group))
    return list(total.split([value.shape[1] for value in values], dim=1))


def synchronize(module: nn.Module, group: ProcessGroup) -> None:
    """Make every batch norm of `module` take its statistics over all processes of `group`."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm):
            norm.group = group


class RunningStatistics:
    """Update the running statistics of several networks from their training forward passes.

    Each view updates them once, in order, with the momentum of the norms. All norms are updated
    together.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        modules = [module for network in networks for module in network.modules()]
        norms = [module for module in modules if isinstance(module, BatchNorm)]
        # Lists of tensors are made once, so that a step takes no time in Python for each norm.
        self._batch = [t for norm in norms for t in (norm.batch_mean, norm.batch_var)]  # [V, C]
        self._running = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
        self._sizes = [len(t) for t in self._running]
        self._counters = [norm.num_batches_tracked for norm in norms]
        self._momentum = _momentum(norms)
        self._next: Tensor | None = None  # [all channels]
        self._seen = 0

    @torch.no_grad()
    def note(self) -> None:
        """Add the statistics of the last training forward pass of all networks."""
        if not self._batch:
            return
        running = torch.cat(self._running) if self._next is None else self._next
        for view in torch.cat(self._batch, dim=1):
            running = self._blend(running, view)
        self._next = running
        self._seen += len(self._batch[0])

    def _blend(self, running: Tensor, view: Tensor) -> Tensor:
        if isinstance(self._momentum, float):
            return torch.lerp(running, view, self._momentum)
        self._momentum = self._momentum.to(running)  # it was made on the CPU
        return torch.lerp(running, view, self._momentum)

    @torch.no_grad()
    def apply(self, skip: Tensor | None = None) -> None:
        """Write to the buffers what was noted since the last call, unless `skip` [] is 1."""
        if self._next is None:
            return
        seen = torch.full_like(self._counters[0], self._seen)
        if skip is not None:
            seen = torch.where(skip > 0, 0, seen)
            self._next = torch.where(skip > 0, torch.cat(self._running), self._next)
        torch._foreach_copy_(self._running, self._next.split(self._sizes))
        torch._foreach_add_(self._counters, [seen] * len(self._counters))
        self._next, self._seen = None, 0


def smallest_momentum(network: nn.Module) -> float:
    """Return the smallest momentum of a network's batch norms; 1.0 when it has none."""
    norms = (module for module in network.modules() if isinstance(module, BatchNorm))
    return min((norm.momentum for norm in norms), default=1.0)


def _momentum(norms: list[BatchNorm]) -> float | Tensor:
    """Return the momentum of all norms, or of every channel, [mean, var, mean, ...]."""
    momenta = {norm.momentum for norm in norms}
    if len(momenta) <= 1:
        return next(iter(momenta), 0.0)
    return torch.cat([torch.full((2 * len(norm.running_mean),), norm.momentum) for norm in norms])
