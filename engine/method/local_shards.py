"""Parameters whose rows are spread over processes: this process's part, and norms of the whole."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The part of each that this process holds, as plain tensors that share its memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter, gathered from the processes that hold its parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_norms(norms: Tensor, group: ProcessGroup | None) -> Tensor:
    """Norms of local parts, of any shape -> those of the whole tensors, by one all-reduce.

    `group`: the processes that the parts are spread over, None when each holds everything.
    """
    if group is None:
        return norms
    squares = norms.double().square()
    dist.all_reduce(squares, group=group)
    return squares.sqrt().to(norms.dtype)


def not_finite(norms: Tensor) -> Tensor:
    """1 when any of `norms` is infinite or nan, else 0, as a float32 [] on the same device."""
    return (~norms.isfinite().all()).float()


def foreach_norms(tensors: list[Tensor]) -> Tensor:
    """The norm of each tensor [n]; an empty part's is 0."""
    return torch.stack(torch._foreach_norm(tensors))
