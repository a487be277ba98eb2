"""torch.compile: which parts of the training are compiled.

Regions are compiled, not the whole network: every residual block, the stem and the heads. Blocks
of one shape share their code, so a ResNet-50 compiles a fraction of its blocks; and gradients
leave the backward block by block, so that DDP's and FSDP's communication overlaps with it. Each
region is one graph, communication of its batch norms included.
"""

import os
import shutil
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.method.byol import Online, Target
from engine.method.lars import LARS
from engine.method.norm import BatchNorm
from shards.errors import InputError

_P = ParamSpec("_P")
_T = TypeVar("_T")


def missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks on this machine, empty when it can work."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "no Triton found"
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"no C++ compiler ({compiler}) found"


def check_norm(group: ProcessGroup, device: torch.device) -> None:
    """Raise InputError when tracing gives the synchronized norm other gradients than eager torch.

    A version of torch has done that in silence, with the right outputs. The check costs a second of
    a start that compiles for a minute or more. All processes of `group` call it together.
    """
    norm = BatchNorm(4, views=2).to(device)
    norm.group = group
    traced = torch.compile(norm.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.arange(128.0, device=device).sin().reshape(8, 4, 2, 2).requires_grad_()
    inputs = [x, norm.weight, norm.bias]

    def differentiate(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(x), inputs, x.detach().exp())

    for expected, found in zip(differentiate(norm.forward), differentiate(traced), strict=True):
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
            raise InputError(
                f"torch {torch.__version__} computes wrong gradients when it compiles the batch "
                "norm of several processes: use --no-compile, or install another version of torch"
            )


def compile_networks(*networks: Online | Target) -> None:
    """Compile every region of the networks in place: the names of parameters stay as they are.

    What is compiled is a region's `forward`, inside of the hooks that wrap the region.
    """
    torch._dynamo.config.optimize_ddp = False  # it would cut regions at its buckets' ends
    # Shapes are few and known: one graph for each block shape of each network.
    torch._dynamo.config.recompile_limit = 256
    # Else one region with a custom backward keeps AOTAutograd's cache from being used at all.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    for network in networks:
        heads = [network.projector]
        heads += [network.predictor] if isinstance(network, Online) else []
        for region in [*network.encoder.blocks(), *heads]:
            region.forward = compiled(region.forward)
        setattr(network.encoder, "stem", compiled(network.encoder.stem))  # noqa: B010


def compile_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Compile what of the optimizer is not one fused kernel already."""
    if isinstance(optimizer, LARS):
        optimizer.directions = compiled(optimizer.directions)


def compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`function` as one graph for each set of shapes."""
    made: Callable[_P, _T] = torch.compile(function, fullgraph=True, dynamic=False)
    return made
