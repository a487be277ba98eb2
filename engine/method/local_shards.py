"""Work on parameters whose rows are spread over processes: local parts, and norms of the whole."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


@torch.no_grad()  # with gradients, a sharded tensor would record in each step how it was made plain
def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this process's part of each tensor, as plain tensors that share its memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return this process's parts of the gradients of parameters that have one."""
    return local(p.grad for p in parameters if p.grad is not None)


def whole(tensor: Tensor) -> Tensor:
    """Gather a whole parameter from the processes that hold its parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_norms(norms: Tensor, group: ProcessGroup | None) -> Tensor:
    """Combine the norms of local parts into the norms of the whole tensors, by one all-reduce.

    Args:
        norms: Norms of this process's parts, of any shape.
        group: The processes that the parts are spread over, None when each holds everything.
    """
    if group is None:
        return norms
    squares = norms.double().square()
    dist.all_reduce(squares, group=group)
    return squares.sqrt().to(norms.dtype)


def not_finite(norms: Tensor) -> Tensor:
    """Return 1 when any of `norms` is infinite or nan, else 0; [] float32 on the same device."""
    return (~norms.isfinite().all()).float()


def foreach_norms(tensors: list[Tensor]) -> Tensor:
    """Compute the norm of each of the n tensors: [n]. An empty tensor has norm 0."""
    held = [tensor for tensor in tensors if tensor.numel()]
    if len(held) == len(tensors):
        return torch.stack(torch._foreach_norm(tensors))
    # Torch's kernel for GPUs leaves empty tensors out. Where it needs several launches, the norms
    # of all tensors of the later ones move by as many places as there were empty tensors before.
    norms = torch._foreach_norm(held) if held else ()
    found, zero = iter(norms), tensors[0].new_zeros(())
    return torch.stack([next(found) if tensor.numel() else zero for tensor in tensors])
