"""What Inductor makes for a GPU, of functions at the sizes of ImageNet."""

import re
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.method.augment import augment
from engine.method.norm import BatchNorm, synchronize
from engine.method.resnet import Bottleneck, ResNetConfig
from engine.processes.compiling import compiled
from shards.views import COLUMNS
from tests.helpers.gpu_code import Graph, lower, trace

pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif(
        torch.__version__ >= "2.15",  # compared as versions
        reason="tests/helpers/gpu_code.py is not known to fit this torch",
    ),
]

ROWS = 16
NORMS = 4  # of a bottleneck whose shortcut is a convolution


@pytest.fixture(autouse=True)
def _mended() -> None:
    pytest.importorskip("triton", reason="this torch comes without Triton")
    compiled(torch.abs)


def kernels(code: str) -> list[str]:
    return re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", code, re.DOTALL)


def max_elements(kernel: str) -> int:
    return max(int(n) for n in re.findall(r"xnumel = (\d+)", kernel))


def test_views_of_photos() -> None:
    """In the layout of the loader, which torch 2.11 did not compile."""
    with FakeTensorMode():
        photos = torch.empty(ROWS, 224, 224, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        (graph,) = trace(augment, photos, torch.empty(ROWS, COLUMNS))
    found = kernels(lower(graph))
    assert len(found) > 5
    # A blur's weights are the same for all pixels of a row. Exponentials are slow.
    exponentials = [kernel for kernel in found if ".exp(" in kernel]
    assert [max_elements(kernel) for kernel in exponentials] == [ROWS]


def test_a_stem_adds_up_the_gradient_of_its_pool_in_order() -> None:
    """Atomic additions come in any order, and equal runs would differ."""

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net.stem(x)

    with FakeTensorMode():
        net = ResNetConfig(18).build(2, 224)
        graphs = trace(forward, torch.empty(ROWS, 224, 224, 3).permute(0, 3, 1, 2))
    assert [graph.kind for graph in graphs] == ["forward", "backward"]
    for graph in graphs:
        code = lower(graph)
        assert len(kernels(code)) > 5
        assert "tl.atomic" not in code


def trace_bottleneck(processes: int) -> list[Graph]:
    """Return the graphs of a bottleneck in bf16, whose norms add up over so many processes."""

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = block(x)
        return y

    with FakeTensorMode():
        block = Bottleneck(256, 64, 2, False, views=2)
        if processes > 1:
            synchronize(block, cast(ProcessGroup, dist.group.WORLD))
        x = torch.empty(ROWS, 56, 56, 256, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        return trace(forward, x.requires_grad_())


def lower_bottleneck(monkeypatch: pytest.MonkeyPatch, processes: int) -> list[str]:
    """Return the code of its forward and of its backward pass, on a GPU."""
    monkeypatch.setattr(BatchNorm, "forward", BatchNorm._normalize_views)  # as on a GPU
    if processes > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        graphs = trace_bottleneck(processes)
        codes = [lower(graph) for graph in graphs]
    finally:
        if processes > 1:
            dist.destroy_process_group()
    assert [graph.kind for graph in graphs] == ["forward", "backward"]
    return codes


@pytest.mark.parametrize(("processes", "forward", "backward"), [(1, 12, 19), (8, 25, 27)])
def test_a_norm_starts_few_kernels(
    monkeypatch: pytest.MonkeyPatch, processes: int, forward: int, backward: int
) -> None:
    """A host needs longer to start a small kernel than a GPU to run it.

    A norm needs a kernel or two for its statistics, one that merges them, and one that applies
    them, which blocks share. With several processes it needs a few more, around the all-reduce.
    """
    codes = lower_bottleneck(monkeypatch, processes)
    for code, most in zip(codes, (forward, backward), strict=True):
        started = [name for name in re.findall(r"(triton_\w+)\.run\(", code) if name not in CASTS]
        assert 3 * NORMS <= len(started) <= most, started


CASTS = {f"triton_poi_fused__to_copy_{number}" for number in range(100)}  # of weights to bf16


@pytest.mark.parametrize("processes", [1, 8])
def test_a_bottleneck_computes_nothing_for_every_pixel_in_float64(
    monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Most GPUs are 32 or 64 times slower in it. Each norm's sums are sent once in a pass."""
    for code in lower_bottleneck(monkeypatch, processes):
        assert code.count("all_reduce_.default(") == (NORMS if processes > 1 else 0)
        sizes = []
        for kernel in kernels(code):
            elements = max_elements(kernel)
            if elements > ROWS * 256:  # more than a value for each image and channel
                sizes.append(elements)
                assert "tl.float64" not in kernel
        assert max(sizes) >= ROWS * 64 * 28 * 28
