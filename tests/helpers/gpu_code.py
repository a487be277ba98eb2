"""Generate the code that Inductor would make for an H100, on a machine without a GPU.

A function is traced on the CPU, and its graphs are lowered with fake tensors of a GPU. The code is
Triton's, and nothing compiles or runs it. Much of torch's inside is replaced for that, so a new
release of torch may need other replacements.
"""

import contextlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.config
import torch._inductor.graph
import torch._inductor.lowering  # which its decompositions need, and do not import themselves
import torch._inductor.scheduler
import torch._subclasses.fake_tensor
import torch.utils._triton
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=85_000_000_000,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2_048,
    max_threads_per_block=1_024,
    warp_size=32,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    gcnArchName="",
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5_120,
)


class Graph(NamedTuple):
    """A graph of a traced function, and tensors like those that it takes."""

    kind: str  # "forward", "backward" or, without gradients, "inference"
    module: GraphModule
    inputs: list[Any]


class _Generated(BaseException):
    """Ends the lowering as soon as there is code."""


def trace(function: Callable[..., Tensor], *inputs: Tensor) -> list[Graph]:
    """Return the graphs of `function`.

    Its inputs and parameters are fake tensors of the CPU, of a mode that is entered.
    """
    found: list[Graph] = []

    def keep(kind: str, module: GraphModule, given: list[Any]) -> Any:
        found.append(Graph(kind, deepcopy(module), list(given)))
        return make_boxed_func(module.forward)

    backend = aot_autograd(
        fw_compiler=partial(keep, "forward"),
        bw_compiler=partial(keep, "backward"),
        inference_compiler=partial(keep, "inference"),
        decompositions=select_decomp_table,
        keep_inference_input_mutations=True,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
    )
    torch._dynamo.reset()
    output = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    if output.requires_grad:
        output.backward(torch.ones_like(output))
    return found


def lower(graph: Graph) -> str:
    """Return the code of a graph, whose tensors are then on the GPU."""
    with contextlib.ExitStack() as stack:
        for replacement in _replacements():
            stack.enter_context(replacement)
        return _lower(graph)


def _lower(graph: Graph) -> str:
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def on_gpu(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)

    for node in graph.module.graph.nodes:
        if node.kwargs.get("device") == CPU:
            node.kwargs = node.kwargs | {"device": GPU}
    graph.module.recompile()
    inputs = [on_gpu(value) for value in graph.inputs]
    FakeTensorProp(graph.module, mode).propagate_dont_convert_inputs(*inputs)
    code: list[str] = []

    def stop(lowering: Any) -> None:
        code.append(lowering.codegen()[0].value)
        raise _Generated

    end = mock.patch.object(torch._inductor.graph.GraphLowering, "_compile_to_module", stop)
    with end, tracing(TracingContext(mode)), contextlib.suppress(_Generated):
        compile_fx_inner(graph.module, inputs, is_backward=graph.kind == "backward")
    return code[0]


class _Driver:
    """What Triton asks its driver for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def _replacements() -> Iterator[Any]:
    """Yield contexts in which torch finds a GPU and never calls the driver."""
    from triton.runtime.driver import driver

    yield mock.patch.object(driver, "_active", _Driver())

    def answers(owner: Any, value: Any, *names: str) -> Iterator[Any]:
        for name in names:
            if hasattr(owner, name):
                yield mock.patch.object(owner, name, return_value=value)

    yield torch._inductor.config.patch(force_disable_caches=True, compile_threads=1)
    interface, worker = device_interface.CudaInterface, device_interface.CudaInterface.Worker
    yield from answers(torch.cuda, True, "is_available")
    yield from answers(
        torch.cuda, 0, "current_device", "_exchange_device", "_maybe_exchange_device"
    )
    yield from answers(torch.cuda, 1, "device_count")
    yield from answers(torch.cuda, None, "set_device", "synchronize", "_lazy_init", "set_rng_state")
    yield from answers(torch.cuda, torch.empty(0), "get_rng_state")
    yield from answers(torch.cuda, False, "is_current_stream_capturing")
    yield from answers(torch._subclasses.fake_tensor, None, "init_gpu_context")
    yield from answers(torch.cuda, (9, 0), "get_device_capability")
    for owner in (torch.cuda, interface, worker):
        yield from answers(owner, PROPERTIES, "get_device_properties")
    yield from answers(interface, True, "is_available", "is_triton_capable", "is_bf16_supported")
    yield from answers(interface, 0, "current_device", "get_raw_stream", "exchange_device")
    yield from answers(interface, 0, "maybe_exchange_device")
    yield from answers(interface, 90, "get_compute_capability")
    yield from answers(interface, None, "set_device", "synchronize", "raise_if_triton_unavailable")
    yield from answers(worker, 0, "current_device")
    yield from answers(torch.accelerator, False, "is_available")
    for owner in (torch._inductor.scheduler, torch.utils._triton):
        yield from answers(owner, True, "has_triton")
    # Without a GPU torch does not know how cuDNN lays out what a convolution returns.
    layout = "_conv_determine_backend_memory_format"
    yield from answers(torch._C, torch.channels_last, layout)
