"""The adaptation of LARS: a weight's direction gets a length in proportion to the weight's own.

Source: You et al., "Large batch training of convolutional networks" (arXiv 1708.03888).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.method.clipping import ClipConfig, clip_factor, unscale_and_clamp
from engine.method.local_shards import (
    foreach_norms,
    local,
    local_gradients,
    not_finite,
    whole_norms,
)
from engine.method.optimizer import Moved


def directions(
    params: list[Tensor], grads: list[Tensor], scale: Tensor | None, weight_decay: float
) -> tuple[list[Tensor], Tensor]:
    """Compute the LARS direction of every parameter, before adaptation and momentum.

    Returns:
        The directions, and the norms [2, tensors] of the parameters and of the directions.
    """
    if scale is None:
        updates = torch._foreach_add(grads, params, alpha=weight_decay)
    else:
        updates = torch._foreach_div(grads, scale)
        torch._foreach_add_(updates, params, alpha=weight_decay)
    return list(updates), foreach_norms([*params, *updates]).unflatten(0, (2, -1))


def adapted_directions(
    moved: Moved,
    scale: Tensor | None,
    clip: ClipConfig,
    shard_group: ProcessGroup | None,
) -> tuple[list[list[Tensor]], Tensor]:
    """Compute g + weight_decay * p, times trust_coefficient * |p| over its norm in some groups.

    Those are the groups with `adapt`, and both norms have to be > 0. The gradients are divided by
    `scale` and clipped before. One all-reduce finds the norms of whole tensors.

    Returns:
        The directions of each group's parameters; and [] float32, 1 when the step is to be skipped
        and else 0, the same on all processes.
    """
    if clip.off:
        found = [
            directions(local(ps), local_gradients(ps), scale, group["weight_decay"])
            for group, ps in moved
        ]
        updates = [own for own, _ in found]
        # [2, all tensors]: of parameters and directions
        norms = whole_norms(torch.cat([lengths for _, lengths in found], dim=1), shard_group)
        skip = not_finite(norms)
    else:
        updates, norms, skip = _clipped_directions(moved, scale, clip, shard_group)
    parts = norms.split([len(own) for own in updates], dim=1)
    for (group, _), own, (p, u) in zip(moved, updates, parts, strict=True):
        if group["adapt"]:
            ratios = torch.where((p > 0) & (u > 0), group["trust_coefficient"] * p / u, 1.0)
            torch._foreach_mul_(own, list(ratios))
    return updates, skip


def _clipped_directions(
    moved: Moved, scale: Tensor | None, clip: ClipConfig, shard_group: ProcessGroup | None
) -> tuple[list[list[Tensor]], Tensor, Tensor]:
    """Compute the directions c g + d p of clipped gradients, in the memory of the gradients.

    The factor c is known only after the all-reduce, and so is the norm of a direction. It is found
    from sums that are reduced along: |c g + d p|^2 = c^2 |g|^2 + 2 c d <g, p> + d^2 |p|^2.

    Returns:
        The directions, the norms [2, tensors] of parameters and directions, and whether to skip.
    """
    params = [local(parameters) for _, parameters in moved]
    grads = [local_gradients(parameters) for _, parameters in moved]
    every_p, every_g = (sum(lists, list[Tensor]()) for lists in (params, grads))
    before = unscale_and_clamp(every_g, scale, clip)
    norms = torch.stack([before, foreach_norms(every_g), foreach_norms(every_p)])
    products = [(g * p).sum(dtype=torch.float64) for g, p in zip(every_g, every_p, strict=True)]
    sums = torch.cat([norms.double().square(), torch.stack(products)[None]])  # [4, tensors]
    if shard_group is not None:
        dist.all_reduce(sums, group=shard_group)
    skip = not_finite(sums)
    factor = clip_factor(sums[1].sum().sqrt(), clip)  # [] float64
    torch._foreach_mul_(every_g, factor.to(norms.dtype))
    lengths = []
    parts = sums.split([len(own) for own in grads], dim=1)
    for (group, _), ps, own, (_, gg, pp, gp) in zip(moved, params, grads, parts, strict=True):
        decay = group["weight_decay"]
        torch._foreach_add_(own, ps, alpha=decay)
        square = factor**2 * gg + 2 * decay * factor * gp + decay**2 * pp
        lengths.append(torch.stack([pp, square.clamp(min=0)]))
    # A direction that clipping made vanish has norm 0, as it would have by foreach_norms: its
    # elements have vanished too, and a ratio of infinity would make nan of them.
    return grads, torch.cat(lengths, dim=1).to(norms.dtype).sqrt(), skip
