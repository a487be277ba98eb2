"""What Inductor makes for a GPU, of functions at the sizes of ImageNet."""

import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.method.augment import augment
from engine.method.norm import BatchNorm
from engine.method.resnet import Bottleneck
from engine.processes.compiling import compiled
from shards.views import COLUMNS
from tests.helpers.gpu_code import lower, trace

pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif(
        torch.__version__ >= "2.15",  # compared as versions
        reason="tests/helpers/gpu_code.py is not known to fit this torch",
    ),
]

ROWS = 16


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


def test_a_bottleneck_computes_nothing_for_every_pixel_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most GPUs are 32 or 64 times slower in it."""
    monkeypatch.setattr(BatchNorm, "forward", BatchNorm._normalize_views)  # as on a GPU

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = block(x)
        return y

    with FakeTensorMode():
        block = Bottleneck(256, 64, 2, False, views=2)
        x = torch.empty(ROWS, 56, 56, 256, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        graphs = trace(forward, x.requires_grad_())
    assert [graph.kind for graph in graphs] == ["forward", "backward"]
    for graph in graphs:
        sizes = []
        for kernel in kernels(lower(graph)):
            elements = max_elements(kernel)
            if elements > ROWS * 256:  # more than a value for each image and channel
                sizes.append(elements)
                assert "tl.float64" not in kernel
        assert max(sizes) >= ROWS * 64 * 28 * 28
