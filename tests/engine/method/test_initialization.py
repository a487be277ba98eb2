"""Each rule of drawing weights, beside torch.nn.init with the same generator."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Generator, Tensor, nn

from engine.method.byol import BYOLConfig, build
from engine.method.initialization import Initialization
from engine.method.resnet import ResNetConfig

SMALL = BYOLConfig(ResNetConfig(10, width=0.125, stem="cifar"), hidden=32, projection=16)


def official(weight: Tensor, *, generator: Generator) -> None:
    std = weight[0].numel() ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def kaiming(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda weight, generator: draw(weight, a=0, mode="fan_in", generator=generator)


RULES: dict[Initialization, Callable[..., Any]] = {
    "official": official,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": kaiming(nn.init.kaiming_uniform_),
    "kaiming_normal": kaiming(nn.init.kaiming_normal_),
    "orthogonal": nn.init.orthogonal_,
}


def test_all_rules_are_here() -> None:
    assert set(RULES) == set(get_args(Initialization))


@pytest.mark.parametrize("rule", RULES)
def test_each_network_is_drawn_on_its_own(rule: Initialization) -> None:
    networks = build(replace(SMALL, initialization=rule), 8, seed=3)
    official_ones = build(SMALL, 8, seed=3)
    for number, (network, other) in enumerate(zip(networks, official_ones, strict=True)):
        generator = Generator().manual_seed(2 * 3 + number)
        layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for layer in layers:
            expected = torch.empty_like(layer.weight)
            RULES[rule](expected, generator=generator)
            assert torch.equal(layer.weight, expected)
            assert layer.bias is None or not layer.bias.any()
        drawn = {id(layer.weight) for layer in layers}
        theirs = dict(other.named_parameters())
        for name, value in network.named_parameters():
            if id(value) not in drawn:  # norms begin alike
                assert torch.equal(value, theirs[name])
            else:
                assert torch.equal(value, theirs[name]) is (rule == "official")
    online, target = networks
    first = [network.encoder.state_dict()["conv1.weight"] for network in (online, target)]
    assert not torch.equal(*first)
