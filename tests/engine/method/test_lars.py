import re
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._python_dispatch import TorchDispatchMode

from engine.method.adamw import AdamWConfig
from engine.method.byol import BYOLConfig, Online, build
from engine.method.lars import LARS, LARSConfig
from engine.method.optimizer import parameter_groups
from engine.method.resnet import ResNetConfig
from tests.helpers.golden_files import golden

pytestmark = pytest.mark.versions

SMALL = BYOLConfig(ResNetConfig(10, width=0.125, stem="cifar"), hidden=32, projection=16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", ["1.5e-6", "1e-2", "0"])
def test_official_steps(decay: str, dtype: torch.dtype) -> None:
    file = golden("lars")
    init = {k.removeprefix("init/"): v for k, v in file.items() if k.startswith("init/")}
    module = nn.ParameterList([value.to(dtype, copy=True) for value in init.values()])
    parameters = dict(zip(init, module.parameters(), strict=True))
    optimizer = LARSConfig(weight_decay=float(decay)).build(module)
    for step, lr in enumerate(file["lr"].tolist(), start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in parameters.items():
            p.grad = file[f"grad{step}/{name}"].to(dtype)
        optimizer.step()
        for name, p in parameters.items():
            exact = file[f"wd{decay}/step{step}/param/{name}"]
            exact_momentum = file[f"wd{decay}/step{step}/momentum/{name}"]
            # An independent recomputation agrees to 5e-16, the official float32 run to 2.2e-7.
            tolerance = 1e-14 if dtype == torch.float64 else 5e-7
            momentum = optimizer.state[p]["momentum_buffer"]
            for value, figure in ((p.detach(), exact), (momentum, exact_momentum)):
                largest = (value.double() - figure).abs().max()
                assert largest <= tolerance * figure.abs().max(), (step, name)


def test_groups() -> None:
    online, _ = build(SMALL, 10, seed=0)
    weights, vectors = parameter_groups(online)
    names = {p: name for name, p in online.named_parameters()}
    norms_and_biases = re.compile(r".*(bn\d|downsample\.1|(projector|predictor)\.1)\..*|.*\.bias")
    expected = {name for name in names.values() if norms_and_biases.fullmatch(name)}
    assert {names[p] for p in vectors["params"]} == expected
    assert {names[p] for p in weights["params"]} == set(names.values()) - expected


def test_without_gradient_nothing_moves() -> None:
    module = nn.Linear(3, 2)
    optimizer = LARSConfig().build(module)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.param_groups[1]["lr"] = 1.0
    before = [p.clone() for p in module.parameters()]
    module.bias.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(module.weight, before[0])
    assert torch.equal(module.bias, before[1] - 1)
    assert optimizer.state[module.weight]["momentum_buffer"].count_nonzero() == 0


def test_momentum_may_be_0() -> None:
    module = nn.Linear(3, 2)
    optimizer = LARSConfig(momentum=0.0).build(module)
    before = module.bias.detach().clone()
    for lr in (1.0, 2.0):
        for group in optimizer.param_groups:
            group["lr"] = lr
        module.bias.grad = torch.ones(2)
        optimizer.step()
    assert torch.equal(module.bias, before - 1 - 2)


class NoReading(TorchDispatchMode):
    """Fails on whatever waits for the device to look at a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [LARSConfig(), AdamWConfig()])
def test_step_reads_nothing_on_the_host(config: LARSConfig | AdamWConfig) -> None:
    module = nn.Linear(3, 2)
    optimizer = config.build(module)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    with NoReading():
        optimizer.step()
        with pytest.raises(AssertionError):
            module.weight.sum().item()


def state(online: Online, optimizer: torch.optim.Optimizer) -> list[Any]:
    return [online.state_dict(), get_optimizer_state_dict(online, optimizer)["state"]]


@pytest.mark.parametrize("config", [LARSConfig(), AdamWConfig()])
@pytest.mark.parametrize("fault", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_changes_nothing(
    config: LARSConfig | AdamWConfig, fault: float
) -> None:
    online, _ = build(SMALL, 10, seed=0)
    optimizer = config.build(online)
    assert advance(online, optimizer, 1) == 0
    before = deepcopy(state(online, optimizer))
    bias = online.get_parameter("projector.1.bias")  # not even adapted

    def spoil(*_: object) -> None:
        assert bias.grad is not None
        bias.grad[3] = fault

    hook = optimizer.register_step_pre_hook(spoil)
    assert advance(online, optimizer, 2) == 1
    torch.testing.assert_close(state(online, optimizer), before, rtol=0, atol=0)
    hook.remove()
    assert advance(online, optimizer, 3) == 0


@pytest.mark.parametrize("config", [LARSConfig(), AdamWConfig()])
def test_scaled_gradients_take_the_same_step(config: LARSConfig | AdamWConfig) -> None:
    plain, _ = build(SMALL, 10, seed=0)
    scaled, _ = build(SMALL, 10, seed=0)
    advance(plain, config.build(plain), 1)
    advance(scaled, config.build(scaled), 1, scale=torch.tensor(1024.0))
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_adamw_is_torchs() -> None:
    ours, _ = build(SMALL, 10, seed=0)
    torchs, _ = build(SMALL, 10, seed=0)
    config = AdamWConfig(weight_decay=0.1)
    optimizer = config.build(ours)
    other = torch.optim.AdamW(parameter_groups(torchs), betas=config.betas, weight_decay=0.1)
    for step in range(3):
        advance(ours, optimizer, step)
        advance(torchs, other, step)
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def advance(
    online: Online, optimizer: torch.optim.Optimizer, step: int, scale: Tensor | None = None
) -> Any:
    """One step on random gradients, multiplied by `scale`; returns what the step does."""
    generator = torch.Generator().manual_seed(step)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for p in online.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
        if scale is not None:
            p.grad *= scale
    return optimizer.step() if scale is None else optimizer.step(scale)  # type: ignore[call-overload]


@pytest.mark.parametrize("config", [LARSConfig(), AdamWConfig()])
def test_resumes_through_distributed_checkpoint(config: LARSConfig | AdamWConfig) -> None:
    online, _ = build(SMALL, 10, seed=0)
    optimizer = config.build(online)
    advance(online, optimizer, 1)

    resumed, _ = build(SMALL, 10, seed=1)
    resumed.load_state_dict(online.state_dict())
    other = config.build(resumed)
    state = deepcopy(get_optimizer_state_dict(online, optimizer))
    set_optimizer_state_dict(resumed, other, state)
    if isinstance(other, LARS):
        key = "projector.0.weight"
        loaded = other.state[resumed.get_parameter(key)]["momentum_buffer"]
        saved = optimizer.state[online.get_parameter(key)]["momentum_buffer"]
        assert saved.count_nonzero() > 0
        assert torch.equal(loaded, saved)

    advance(online, optimizer, 2)
    advance(resumed, other, 2)
    for p, q in zip(online.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_checkpoint_needs_no_step_before_it() -> None:
    online, _ = build(SMALL, 10, seed=0)
    state = get_optimizer_state_dict(online, LARSConfig().build(online))["state"]
    assert set(state) == {name for name, _ in online.named_parameters()}


def test_adamw_decays_weights_only() -> None:
    module = nn.Linear(3, 2)
    optimizer = AdamWConfig(weight_decay=0.5).build(module)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = [p.clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(module.weight, before[0] * 0.95)
    assert torch.equal(module.bias, before[1])
