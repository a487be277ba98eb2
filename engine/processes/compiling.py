"""Compile the parts of the training with torch.compile.

The networks are compiled by regions, not as a whole. A region is a residual block, the stem or a
head. Blocks of the same shape share their code, so a ResNet-50 compiles only a fraction of its
blocks. Gradients leave the backward pass block by block, so that the communication of DDP and FSDP
overlaps with it. Each region is one graph, which includes the communication of its batch norms.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
import torch._dynamo
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.method.byol import Online, Target
from engine.method.norm import BatchNorm
from engine.method.resnet import ResNet
from engine.processes.world import World
from shards.errors import InputError

_P = ParamSpec("_P")
_T = TypeVar("_T")


def find_missing_compiler(device: torch.device) -> str:
    """Name what torch.compile lacks on this machine; return "" when it lacks nothing.

    On a CPU, Inductor makes a C++ module for Python of each graph. On a GPU, Triton makes one in C
    that starts its kernels.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "no Triton found, or none for this GPU"
        language, variable, names = "C", "CC", ["gcc", "clang"]
    else:
        language, variable, names = "C++", "CXX", ["g++"]
    if variable in os.environ:
        names = [os.environ[variable]]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        return f"no {language} compiler ({' or '.join(names)}) found"
    if not _finds_headers(found):
        version = ".".join(map(str, sys.version_info[:2]))
        return f"no Python.h found (Linux has it in a package such as python{version}-dev)"
    return ""


def announce(device: torch.device) -> str:
    """Return the line that tells why the first step takes so long."""
    line = "torch.compile works in the first step, which can take minutes"
    if device.type == "cpu":
        line += "; a CPU gains little by it, and --no-compile starts at once"
    return line


def _finds_headers(compiler: str) -> bool:
    """Return whether a compiler finds the headers of this Python, which many machines lack."""
    # Debian's Python names another folder by default than the one that its headers are in.
    folders = {sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")}
    command = [compiler, *(f"-I{folder}" for folder in folders), "-E", "-x", "c", "-"]
    text = b"#include <Python.h>\n"
    try:
        return subprocess.run(command, input=text, capture_output=True).returncode == 0
    except OSError:
        return False


def check_norm(world: World, compiles: bool) -> None:
    """Raise InputError when tracing changes the gradients of the batch norm of whole views.

    One version of torch did so silently, with correct outputs. The check takes a second, in a
    start that compiles for a minute or more. All processes call it together, each with whether it
    compiles, in which machines may differ. Nothing is checked where none does, nor for one process
    on a CPU, which has another norm.
    """
    device = world.device
    alone = world.size == 1
    if not any(world.all_gather_object(compiles)) or (alone and device.type == "cpu"):
        return
    norm = BatchNorm(4, views=2).to(device)
    norm.group = None if alone else cast(ProcessGroup, dist.group.WORLD)
    traced = torch.compile(norm.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.arange(128.0, device=device).sin().reshape(8, 4, 2, 2).requires_grad_()
    inputs = [x, norm.weight, norm.bias]

    def differentiate(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(x), inputs, x.detach().exp())

    for expected, found in zip(differentiate(norm.forward), differentiate(traced), strict=True):
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
            raise InputError(
                f"torch {torch.__version__} computes wrong gradients when it compiles the batch "
                "norm: use --no-compile, or install another version of torch"
            )


def compile_networks(*networks: Online | Target) -> None:
    """Compile every region of the networks in place; the parameters keep their names.

    Only the region's `forward` is compiled. Hooks that wrap the region stay outside of the graph.
    """
    torch._dynamo.config.optimize_ddp = False  # else regions are split at the ends of DDP's buckets
    # Each block shape of each network needs a graph of its own. The shapes are few and known.
    torch._dynamo.config.recompile_limit = 256
    # Without this, one region with a custom backward disables the whole cache of AOTAutograd.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    for network in networks:
        heads = [network.projector]
        heads += [network.predictor] if isinstance(network, Online) else []
        for region in [*network.encoder.blocks(), *heads]:
            region.forward = compiled(region.forward)
        if isinstance(network.encoder, ResNet):  # elsewhere the stem is no function of its own
            setattr(network.encoder, "stem", compiled(network.encoder.stem))  # noqa: B010


def compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return `function` compiled as one graph for each set of shapes."""
    _pass_over_tilings()
    _pool_in_order()
    made: Callable[_P, _T] = torch.compile(function, fullgraph=True, dynamic=False)
    return made


def _pass_over_tilings() -> None:
    """Let Inductor of torch 2.11 pass over a tiling that does not fit a kernel.

    In one place it raises its exception for that without the arguments, which ends in a TypeError.
    The augmentation of photos on a GPU did.
    """
    if torch.__version__ < "2.12":  # compared as versions
        from torch._inductor.codegen import simd

        simd.CantSplit.__init__.__defaults__ = (None, None)


def _pool_in_order() -> None:
    """Let Inductor add up the gradient of a max pool in an order that is always the same.

    Newer versions of torch make a `scatter_add` of it, whose order differs from run to run on a
    GPU. Without that decomposition Inductor gathers for each pixel, as it did in torch 2.11. The
    backward pass of a ResNet's stem then also moves a third fewer bytes.
    """
    from torch._inductor.decomposition import decompositions

    decompositions.pop(torch.ops.aten.max_pool2d_with_indices_backward.default, None)
