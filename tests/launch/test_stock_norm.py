"""The hand-made synchronized norm of the stock side is batch norm of the whole batch."""

from typing import Any

import torch
from torch import Tensor, nn

from engine.processes import world
from launch.benchmarks.stock_norm import HandMadeSyncNorm, synchronize_by_hand
from tests.helpers.ranks import Ranks

SHAPES = ((12, 5, 3, 2), (12, 5))  # of the rows of both ranks


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows and their upstream gradients, far from zero and of another size in each rank."""
    generator = torch.Generator().manual_seed(len(shape))
    x, upstream = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return x * torch.arange(1.0, len(x) + 1).reshape(-1, *[1] * (x.ndim - 1)) + 3, upstream


def normalize(norm: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """What a forward and a backward pass leave."""
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(upstream)
    gradients = {f"d{name}": p.grad.clone() for name, p in norm.named_parameters()}  # type: ignore[union-attr]
    found = {"y": y, "dx": x.grad, **gradients, **norm.state_dict()}
    return {name: value.detach() for name, value in found.items() if value is not None}


def make(shape: tuple[int, ...]) -> nn.Module:
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 6.0))
        norm.bias.copy_(torch.arange(5.0))
    return norm


def normalize_on_a_rank(shape: tuple[int, ...]) -> dict[str, Any]:
    here = world.join(1, distributed=True)
    half = slice(6 * here.rank, 6 * here.rank + 6)
    x, upstream = batch(shape)
    module = synchronize_by_hand(nn.Sequential(make(shape)))[0]  # type: ignore[index]
    assert isinstance(module, HandMadeSyncNorm)
    found = normalize(module.double(), x[half], upstream[half])
    module.eval()
    return found | {"evaluated": module(x[half]).detach()}


def test_the_hand_made_norm_is_that_of_the_whole_batch(ranks: Ranks) -> None:
    for shape in SHAPES:
        first, second = ranks.run(normalize_on_a_rank, shape, size=2)
        whole = make(shape)
        x, upstream = batch(shape)
        expected = normalize(whole, x, upstream)
        expected["evaluated"] = whole.eval()(x).detach()
        for name, value in expected.items():
            if name in ("y", "dx", "evaluated"):
                found = torch.cat([first[name], second[name]])
            elif name in ("dweight", "dbias"):  # each process has the part of its own rows
                found = first[name] + second[name]
            else:
                found = first[name]
                torch.testing.assert_close(second[name], found, rtol=0, atol=0)
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12, msg=name)
