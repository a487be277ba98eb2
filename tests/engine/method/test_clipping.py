"""Clipping against torch.nn.utils in float64, whatever the optimizer makes of the gradients."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.method.adamw import AdamW, AdamWConfig
from engine.method.clipping import ClipConfig, clip_gradients
from engine.method.lars import LARSConfig
from engine.method.optimizer import parameter_groups
from engine.method.sgd import SGD, SGDConfig
from engine.method.torch_optimizer import TorchOptimizerConfig
from tests.engine.method.test_lars import NoReading

pytestmark = pytest.mark.versions

CLIPS = [
    ClipConfig(norm=0.5),
    ClipConfig(value=0.1),
    ClipConfig(norm=0.3, value=0.1),
    ClipConfig(norm=1e6),  # longer than any gradient
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(7, 5)).double()


def draw_gradients(module: nn.Module, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = factor * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def clip_as_torch(module: nn.Module, clip: ClipConfig) -> None:
    if clip.value:
        nn.utils.clip_grad_value_(module.parameters(), clip.value)
    if clip.norm:
        nn.utils.clip_grad_norm_(module.parameters(), clip.norm)


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_gradients_are_clipped_as_by_torch(clip: ClipConfig) -> None:
    ours, torchs = network(), network()
    for module in (ours, torchs):
        draw_gradients(module, 1)
    clip_as_torch(torchs, clip)
    grads: list[Any] = [p.grad for p in ours.parameters()]
    for g in grads:
        g *= 8
    skip, left = clip_gradients(grads, torch.tensor(8.0), clip, None)
    assert (skip.item(), left) == (0, None)
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)


def test_nothing_is_touched_when_it_is_off() -> None:
    module = network()
    draw_gradients(module, 1)
    before = deepcopy([p.grad for p in module.parameters()])
    grads: list[Any] = [p.grad for p in module.parameters()]
    scale = torch.tensor(8.0)
    assert clip_gradients(grads, scale, ClipConfig(), None)[1] is scale
    assert all(torch.equal(g, was) for g, was in zip(grads, before, strict=True))  # type: ignore[arg-type]


def lars_in_float64(module: nn.Module, momenta: dict[Tensor, Tensor], lr: float) -> None:
    """LARS of clipped gradients by its definition, one tensor after the other."""
    with torch.no_grad():
        for group in parameter_groups(module):
            for p in group["params"]:
                u = p.grad + group.get("weight_decay", 0.1) * p
                if group["adapt"]:
                    u = u * 1e-3 * p.norm() / u.norm()
                momenta[p] = 0.9 * momenta[p] + u if p in momenta else u
                p -= lr * momenta[p]


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lars_takes_the_norms_of_clipped_directions(clip: ClipConfig, dtype: torch.dtype) -> None:
    ours, exact = network().to(dtype), network()
    optimizer, momenta = LARSConfig(weight_decay=0.1).build(ours), dict[Tensor, Tensor]()
    for step in range(4):
        for module in (ours, exact):
            draw_gradients(module, step)
        for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
            p.grad = q.grad.to(dtype, copy=True)  # type: ignore[union-attr]
        for group in optimizer.param_groups:
            group["lr"] = 2.0
        clip_as_torch(exact, clip)
        assert optimizer.step(clip=clip) == 0
        lars_in_float64(exact, momenta, 2.0)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=tolerance)


def test_a_gradient_that_vanishes_by_clipping_makes_no_weight_nan() -> None:
    module = network().float()
    draw_gradients(module, 1)
    optimizer = LARSConfig(weight_decay=0.0).build(module)
    for group in optimizer.param_groups:
        group["lr"] = 2.0
    assert optimizer.step(clip=ClipConfig(norm=1e-42)) == 0
    assert all(p.isfinite().all() for p in module.parameters())


Make = Callable[[Any], torch.optim.Optimizer]
STOCK: list[tuple[Any, Make]] = [
    (
        SGDConfig(momentum=0.8, nesterov=True, weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    (
        SGDConfig(momentum=0.0, weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, weight_decay=0.1),
    ),
    (AdamWConfig(weight_decay=0.1), lambda groups: torch.optim.AdamW(groups, weight_decay=0.1)),
    (
        TorchOptimizerConfig("RMSprop", weight_decay=0.1),
        lambda groups: torch.optim.RMSprop(groups, weight_decay=0.1),
    ),
]


@pytest.mark.parametrize("clip", [ClipConfig(), *CLIPS[:3]], ids=str)
@pytest.mark.parametrize(("config", "make"), STOCK, ids=lambda value: type(value).__name__)
def test_steps_are_those_of_torch_after_its_clipping(
    config: Any, make: Make, clip: ClipConfig
) -> None:
    ours, torchs = network(), network()
    optimizer, stock = config.build(ours), make(parameter_groups(torchs))
    for step in range(4):
        scale = torch.tensor(256.0) if step % 2 else None
        draw_gradients(ours, step, 256.0 if step % 2 else 1.0)
        draw_gradients(torchs, step)
        clip_as_torch(torchs, clip)
        for group in (*optimizer.param_groups, *stock.param_groups):
            group["lr"] = 0.1 / (step + 1)
        # Torch's other optimizers read their counters of steps, which are on the host here.
        with NoReading() if isinstance(optimizer, SGD | AdamW) else nullcontext():
            skip = optimizer.step(scale, clip)
        assert skip == 0
        stock.step()
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("fault", [math.inf, math.nan])
@pytest.mark.parametrize(
    "config", [LARSConfig(), AdamWConfig(), SGDConfig(), TorchOptimizerConfig("NAdam")], ids=str
)
def test_a_clamp_does_not_hide_an_infinite_gradient(config: Any, fault: float) -> None:
    module = network()
    optimizer = config.build(module)
    draw_gradients(module, 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step(clip=CLIPS[2])
    parameters = list(module.parameters())
    before = deepcopy([parameters, [optimizer.state[p] for p in parameters]])
    draw_gradients(module, 1)
    gradient = module.get_parameter("1.bias").grad
    assert gradient is not None
    gradient[2] = fault
    assert optimizer.step(clip=CLIPS[2]) == 1
    after = [parameters, [optimizer.state[p] for p in parameters]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
