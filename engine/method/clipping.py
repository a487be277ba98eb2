"""Clip gradients, and decide whether a step is skipped because one of them is not finite.

Source: Pascanu et al., "On the difficulty of training recurrent neural networks" (arXiv
1211.5063); the formulas are those of torch.nn.utils.clip_grad_norm_ and clip_grad_value_.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.method.local_shards import foreach_norms, not_finite, whole_norms


@dataclass(frozen=True)
class ClipConfig:
    """Configure the clipping of gradients. The official method has none."""

    norm: Annotated[float, Interval(ge=0, le=1e9)] = 0.0
    """Largest norm of the gradient of all parameters together, those of the online head included.
    A longer gradient is scaled down to it. 0 turns this off."""

    value: Annotated[float, Interval(ge=0, le=1e9)] = 0.0
    """Largest absolute value of an element of the gradient, before norm is looked at. 0 turns this
    off."""

    @property
    def off(self) -> bool:
        """Return whether gradients are left as they are."""
        return not (self.norm or self.value)


OFF = ClipConfig()


def clip_gradients(
    grads: list[Tensor], scale: Tensor | None, clip: ClipConfig, group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Clip the gradients in place, and decide whether to skip the step, by one all-reduce.

    Args:
        grads: This process's parts of the gradients of all parameters, n of them.
        scale: [] float32, the gradients are to be divided by it, and then clipped.
        group: The processes that the parts are spread over, None when each holds everything.

    Returns:
        [] float32, 1 when a gradient is not finite and else 0, the same on all processes; and what
        the gradients still have to be divided by, None when that is nothing.
    """
    if clip.off:
        norms = foreach_norms(grads)
        if scale is not None:
            norms = norms / scale
        return not_finite(whole_norms(norms, group)), scale
    before = unscale_and_clamp(grads, scale, clip)
    norms = whole_norms(torch.stack([before, foreach_norms(grads)]), group)  # [2, n]
    if clip.norm:
        torch._foreach_mul_(grads, clip_factor(norms[1].norm(), clip))
    return not_finite(norms), None


def unscale_and_clamp(grads: list[Tensor], scale: Tensor | None, clip: ClipConfig) -> Tensor:
    """Divide the gradients by `scale` and clamp their elements, in place.

    Returns:
        The norms [n] between the two. A clamp turns an infinite gradient into a finite one, so
        only these tell that a step is to be skipped.
    """
    if scale is not None:
        torch._foreach_div_(grads, scale)
    norms = foreach_norms(grads)
    if clip.value:
        torch._foreach_clamp_max_(grads, clip.value)
        torch._foreach_clamp_min_(grads, -clip.value)
    return norms


def clip_factor(norm: Tensor, clip: ClipConfig) -> Tensor:
    """Return what a gradient of this `norm` [] is multiplied by, at most 1; as torch does it."""
    if not clip.norm:
        return torch.ones_like(norm)
    return (clip.norm / (norm + 1e-6)).clamp(max=1.0)
