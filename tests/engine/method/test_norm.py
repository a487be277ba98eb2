from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from engine.method.norm import BatchNorm, RunningStatistics

pytestmark = pytest.mark.versions


def pair(views: int, channels: int = 5) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Ours and torch's in float64, with the same random parameters."""
    ours, torchs = BatchNorm(channels, views).double(), nn.BatchNorm2d(channels).double()
    for p in ours.parameters():
        nn.init.normal_(p)
    torchs.load_state_dict(ours.state_dict(), strict=True)
    return ours, torchs


def settle(norm: nn.Module) -> None:
    """Let running statistics follow the last forward."""
    statistics = RunningStatistics([norm])
    statistics.note()
    statistics.apply()


def close(ours: Tensor | None, torchs: Tensor | None) -> None:
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_is_torchs_norm_on_each_view(views: int, memory_format: torch.memory_format) -> None:
    ours, torchs = pair(views)
    for _ in range(2):  # running statistics of several updates
        x = 3 + 2 * torch.randn(6 * views, 5, 4, 3, dtype=torch.float64)
        x = x.contiguous(memory_format=memory_format)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = ours(mine)
        settle(ours)
        expected = torch.cat([torchs(view) for view in other.chunk(views)])
        upstream = torch.randn_like(y)
        torch.autograd.backward([y, expected], [upstream, upstream])
        close(y, expected)
        close(mine.grad, other.grad)
        assert y.is_contiguous(memory_format=memory_format)
    close(ours.weight.grad, torchs.weight.grad)
    close(ours.bias.grad, torchs.bias.grad)
    for name, value in ours.state_dict().items():
        close(value, torchs.state_dict()[name])
    close(ours.eval()(x), torchs.eval()(x))


def test_rows_without_space() -> None:
    ours, torchs = pair(views=2)
    x = torch.randn(8, 5, dtype=torch.float64)
    close(ours(x), torch.cat([torchs(view[..., None, None]) for view in x.chunk(2)])[..., 0, 0])


def test_views_do_not_see_each_other() -> None:
    norm = BatchNorm(3, views=2)
    x = torch.randn(8, 3)
    first = norm(x)[:4]
    x[4:] += 100
    assert torch.equal(norm(x)[:4], first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    norm = BatchNorm(3, views=2)
    x = (30 + torch.randn(2048, 3, 4, 4)).to(dtype)
    with torch.autocast("cpu", dtype):
        y = norm(x)
    settle(norm)
    assert y.dtype == dtype
    means = [view.double().mean((0, 2, 3)) for view in x.chunk(2)]
    expected = 0.9 * 0.1 * means[0] + 0.1 * means[1]
    assert norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean.double(), expected, rtol=1e-6, atol=0)


def test_variance_survives_a_large_mean() -> None:
    norm = BatchNorm(3, views=2)
    x = 1000 + torch.randn(512, 3, 8, 8)
    norm(x)
    settle(norm)
    variances = [view.double().var((0, 2, 3)) for view in x.chunk(2)]
    expected = 0.81 + 0.09 * variances[0] + 0.1 * variances[1]
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-5, atol=0)


def test_rows_that_do_not_split() -> None:
    with pytest.raises(ValueError, match=r"^7 rows do not split into 2 views$"):
        BatchNorm(3, views=2)(torch.randn(7, 3))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1, 1)])
def test_single_value_per_channel(shape: tuple[int, ...]) -> None:
    norm = BatchNorm(3, views=2)
    for forward in (norm, norm._normalize_views):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            forward(torch.randn(shape))
    assert norm.num_batches_tracked == 0


def test_compiles_to_one_graph() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4, views=2), nn.ReLU())
    x = torch.randn(8, 3, 6, 6)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected = net(x)
    settle(net)
    after = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(before)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    settle(net)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(net.state_dict(), after)


# What a GPU compiles, also with one process ---------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (6, 5)])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_views_together_are_torchs_norm_on_each_view(views: int, shape: tuple[int, ...]) -> None:
    ours, torchs = pair(views)
    torchs._check_input_dim = lambda _: None  # type: ignore[method-assign, assignment]
    traced = torch.compile(
        ours._normalize_views, backend="aot_eager", fullgraph=True, dynamic=False
    )
    x = 3 + 2 * torch.randn(shape[0] * views, *shape[1:], dtype=torch.float64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = traced(mine)
    settle(ours)
    expected = torch.cat([torchs(view) for view in other.chunk(views)])
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    close(y, expected)
    close(mine.grad, other.grad)
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        close(p.grad, q.grad)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), rtol=1e-12, atol=1e-13)


def test_a_compiled_graph_computes_nothing_for_every_pixel_in_float64() -> None:
    """What it reads of each channel is made before, in a kernel of its own."""
    norm, x = BatchNorm(3, views=2), torch.randn(8, 3, 5, 5, requires_grad=True)
    read: list[list[torch.dtype]] = []

    def look(graph: torch.fx.GraphModule, _: object) -> Any:
        def computed(node: torch.fx.Node) -> list[torch.dtype]:
            """The types of what a compiler may put into the kernel that reads `node`."""
            value = node.meta.get("val")
            if node.op != "call_function" or not isinstance(value, Tensor):
                return []
            if node.target == torch.ops.aten.as_strided.default or value.numel() >= x.numel():
                return []
            before = [dtype for one in node.all_input_nodes for dtype in computed(one)]
            return [value.dtype, *before]

        found: list[torch.dtype] = []
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, Tensor):
                assert value.numel() < x.numel() or value.dtype == torch.float32
                if value.numel() == x.numel():
                    found += [dtype for one in node.all_input_nodes for dtype in computed(one)]
        read.append(found)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    traced = torch.compile(norm._normalize_views, backend=backend, fullgraph=True, dynamic=False)
    traced(x).sum().backward()
    assert len(read) == 2
    for found in read:  # forward and backward
        assert found
        assert set(found) == {torch.float32}
