from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torchvision
from torch import Generator, Tensor, nn

from engine.method.initialization import initialize
from engine.method.norm import RunningStatistics
from engine.method.resnet import Bottleneck, ResNet, ResNetConfig

Depth = Literal[10, 18, 34, 50, 101, 152, 200]


def build(config: ResNetConfig, views: int = 1) -> ResNet:
    net = ResNet(config, views)
    initialize(net, Generator().manual_seed(0))
    return net


@pytest.mark.parametrize("depth", [18, 50])
def test_equals_torchvision(depth: Depth) -> None:
    net = build(ResNetConfig(depth)).double()
    for p in net.parameters():  # or the zero gammas would hide whole blocks
        if p.ndim == 1:
            nn.init.normal_(p, 1.0, 0.1)
    theirs = getattr(torchvision.models, f"resnet{depth}")().double()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(net.state_dict(), strict=True)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for training in (True, False):
            features = net.train(training)(x)
            assert features.shape == (4, net.feature_dim)
            torch.testing.assert_close(features, theirs.train(training)(x), rtol=1e-11, atol=1e-12)
            statistics = RunningStatistics([net])
            if training:
                statistics.note()
            statistics.apply()
    torch.testing.assert_close(net.state_dict(), theirs.state_dict(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stem_pools_before_its_relu_with_the_same_result(dtype: torch.dtype) -> None:
    """Bit for bit, and where several pixels of a window are largest, or none is positive."""
    net = build(ResNetConfig(18), views=2)
    x = torch.randn(8, 3, 32, 32, generator=Generator().manual_seed(1))
    inputs = [net.conv1.weight, net.bn1.weight, net.bn1.bias]

    def relu_first(x: Tensor) -> Tensor:
        return torch.max_pool2d(torch.relu(net.bn1(net.conv1(x))), 3, 2, padding=1)

    def pass_through(stem: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = stem(x)
        return [y, *torch.autograd.grad(y, inputs, y.detach().cos())]

    ours, usual = pass_through(net.stem), pass_through(relu_first)
    assert ours[0].dtype == dtype
    assert (ours[0] == 0).any()
    for found, expected in zip(ours, usual, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_torchvisions_keys_and_shapes(depth: Depth) -> None:
    with torch.device("meta"):
        ours = ResNet(ResNetConfig(depth), views=2).state_dict()
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    shapes = {key: value.shape for key, value in theirs.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.items()} == shapes


@pytest.mark.parametrize(("depth", "blocks"), [(10, [1, 1, 1, 1]), (200, [3, 24, 36, 3])])
def test_block_counts_beyond_torchvision(depth: Depth, blocks: list[int]) -> None:
    with torch.device("meta"):
        net = ResNet(ResNetConfig(depth), views=2)
    assert [len(group) for group in (net.layer1, net.layer2, net.layer3, net.layer4)] == blocks
    assert isinstance(net.layer1[0], Bottleneck) == (depth == 200)


def test_width() -> None:
    with torch.device("meta"):
        narrow = ResNet(ResNetConfig(18, width=0.25), views=2)
        wide = ResNet(ResNetConfig(50, width=4), views=2)
    channels = [narrow.get_parameter(f"layer{i}.0.conv1.weight").shape[0] for i in (1, 2, 3, 4)]
    assert channels == [16, 32, 64, 128]
    assert (narrow.conv1.out_channels, narrow.feature_dim) == (16, 128)
    assert (wide.conv1.out_channels, wide.feature_dim) == (256, 8192)
    assert sum(p.numel() for p in wide.parameters()) == pytest.approx(375e6, rel=0.01)  # the paper


def test_cifar_stem_keeps_the_size() -> None:
    net = build(ResNetConfig(10, width=0.25, stem="cifar"))
    sizes = []
    net.layer1.register_forward_hook(lambda *args: sizes.append(args[2].shape[2:]))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 128)
    assert sizes == [(32, 32)]


def test_projection_shortcut() -> None:
    def keys(depth: Depth, projection: bool) -> set[str]:
        with torch.device("meta"):
            config = ResNetConfig(depth, projection_shortcut=projection)
            return set(ResNet(config, views=2).state_dict())

    added = keys(18, True) - keys(18, False)
    assert {key.rpartition(".")[0] for key in added} == {
        "layer1.0.downsample.0",
        "layer1.0.downsample.1",
    }
    assert keys(50, True) == keys(50, False)


def test_initialization() -> None:
    net = nn.ModuleDict({"encoder": build(ResNetConfig(50)), "head": nn.Linear(2048, 1000)})
    initialize(net, Generator().manual_seed(1))
    for name, p in net.named_parameters():
        if p.ndim > 1:
            std = p[0].numel() ** -0.5
            assert p.abs().max() <= 2 * std
            # A unit normal cut at 2 has standard deviation 0.87963.
            assert p.std().item() == pytest.approx(0.87963 * std, rel=4 * p.numel() ** -0.5)
            assert abs(p.mean().item()) < 4 * std * p.numel() ** -0.5
        else:
            gamma = "bn" in name or "downsample" in name
            expected = 1.0 if gamma and name.endswith("weight") and "bn3" not in name else 0.0
            assert (p == expected).all(), name


def test_initialization_is_the_generators() -> None:
    config = ResNetConfig(10, width=0.25)
    first, second = build(config).state_dict(), build(config).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_compiles_to_one_graph() -> None:
    net = build(ResNetConfig(10, width=0.25, stem="cifar"), views=2)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 3, 16, 16)
    torch.testing.assert_close(compiled(x), net(x))
