"""The online head: its loss over the rows that have a label, and a learning rate of its own.

The head is the linear classifier of the online network (`Online.classifier`). It learns along with
the encoder, without changing it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.method.byol import OnlineOutput, byol_loss

_OWN_RATE = "head"  # marks the groups of parameters that belong to the head


def count_labels(labels: Tensor) -> Tensor:
    """Count the rows that have a label: [b] -> [] float64 on the same device."""
    return (labels >= 0).sum(dtype=torch.float64)


def head_loss(logits: Tensor | None, labels: Tensor, rows: Tensor) -> Tensor:
    """Compute the cross-entropy [] of some rows, as their part of a mean over `rows` rows.

    Rows without a label (-1) are left out. The parts of all micro-batches and all processes add up
    to the mean over the labeled rows of the global batch, and to 0 when it has none.

    Args:
        logits: [b, classes]; None when there is no head.
        labels: [b] int64.
        rows: [], the number of labeled rows in the global batch.
    """
    if logits is None:
        return torch.zeros((), device=labels.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / rows.clamp(min=1).to(total.dtype)


def whole_loss(output: OnlineOutput, projection: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss [] of a step with one process and one micro-batch.

    Args:
        output: What the online network makes of the images [2b, 3, S, S].
        projection: [2b, D], the target network's.
        labels: [b] int64, -1 where there is none.
    """
    byol_term = byol_loss(output.prediction, projection).mean()
    return byol_term + head_loss(output.logits, labels, count_labels(labels))


def set_apart(optimizer: Optimizer, head: nn.Module) -> None:
    """Move the head's parameters into groups of their own, for `set_rates`.

    Each group keeps the options of the one that it was a part of. The names under which a
    checkpoint holds the optimizer's state do not depend on the groups.
    """
    own = {id(p) for p in head.parameters()}
    apart: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        theirs = [p for p in group["params"] if id(p) in own]
        group["params"] = [p for p in group["params"] if id(p) not in own]
        apart.append({**group, "params": theirs, _OWN_RATE: True})
    optimizer.param_groups.extend(group for group in apart if group["params"])


def set_rates(optimizer: Optimizer, rate: float | Tensor, head_rate: float | Tensor) -> None:
    """Set the learning rate of this step: `head_rate` in the head's own groups, if it has any."""
    for group in optimizer.param_groups:
        group["lr"] = head_rate if _OWN_RATE in group else rate
