"""Keep a compiled graph from computing a few values anew for every pixel that they belong to."""

import torch
from torch import Tensor


def compute_once(*values: Tensor) -> tuple[Tensor, ...]:
    """Return the `values`, tensors of one shape, which a compiled graph then computes once.

    Inductor puts what is cheap into the kernels that read it, which for one value of an image or a
    channel means once for every pixel. Float64 is slow on most GPUs, and so are exponentials and
    divisions. Inductor writes to memory what `as_strided` reads, mostly in the kernel that sums up.
    """
    if not torch.compiler.is_compiling():
        return values
    # A list, because Dynamo cannot trace a generator here.
    return tuple([value.as_strided(value.shape, value.stride()) for value in values])
