"""Every usable optimizer of torch.optim takes torch's own steps, and can be skipped and resumed."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from engine.method import torch_optimizer
from engine.method.lars import LARSConfig
from engine.method.optimizer import parameter_groups
from engine.method.sgd import SGDConfig
from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.method.torch_options import ELEMENTWISE, read_options
from engine.recipe import Recipe
from shards.errors import InputError
from tests.engine.method.test_clipping import draw_gradients, network

pytestmark = pytest.mark.versions

OPTIONS: dict[str, tuple[str, ...]] = {
    "ASGD": ("lambd=0.01", "t0=1"),
    "Adadelta": ("rho=0.8",),
    "Adafactor": ("d=1.5",),
    "Adagrad": ("lr_decay=0.1", "initial_accumulator_value=0.2"),
    "Adam": ("amsgrad=True", "betas=(0.8, 0.9)"),
    "AdamW": ("eps=1e-3",),
    "Adamax": ("betas=(0.8,0.9)",),
    "NAdam": ("decoupled_weight_decay=True",),
    "RAdam": ("betas=(0.5,0.6)",),
    "RMSprop": ("momentum=0.5", "centered=true", "alpha=0.9"),
    "Rprop": ("etas=(0.4, 1.3)",),
    "SGD": ("momentum=0.9", "nesterov=True"),
}
PLAIN = [(name, ()) for name in ("Adam", "RMSprop", "SGD")]
ALL = [*OPTIONS.items(), *PLAIN]


@pytest.fixture(autouse=True)
def _float64() -> Any:
    """Torch's own scalars, such as the steps, have the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def advance(module: nn.Module, optimizer: Any, step: int, lr: float = 0.05) -> Any:
    draw_gradients(module, step)
    for group in optimizer.param_groups:
        group["lr"] = lr / (step + 1)
    return optimizer.step()


def contents(module: nn.Module, optimizer: Any) -> list[Any]:
    return deepcopy(
        [list(module.parameters()), get_optimizer_state_dict(module, optimizer)["state"]]
    )


def make_stock(name: str, options: tuple[str, ...], module: nn.Module, decay: float) -> Any:
    groups = parameter_groups(module)
    groups[0]["weight_decay"] = decay
    return getattr(torch.optim, name)(groups, lr=0.05, **read_options(name, options))


def test_all_of_torchs_are_known() -> None:
    refused = {"LBFGS", "Muon", "SparseAdam", "Optimizer"}
    theirs = {name for name in torch.optim.__all__ if name[0].isupper()}
    assert theirs - refused == set(OPTIONS)
    assert {*ELEMENTWISE, "Adafactor"} == set(OPTIONS)


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_takes_torchs_steps(name: str, options: tuple[str, ...]) -> None:
    decay = 0.0 if name == "Rprop" else 0.1
    ours, torchs = network(), network()
    config = TorchOptimizerConfig(name, options, weight_decay=decay)
    config.check(spread=False)
    optimizer, stock = config.build(ours), make_stock(name, options, torchs, decay)
    before = contents(ours, optimizer)
    for step in range(5):
        if step in (0, 3):  # also the first step, in which torch makes some state of the rate
            before = contents(ours, optimizer)
            hook = optimizer.register_step_pre_hook(lambda *_: spoil(ours))
            assert advance(ours, optimizer, step) == 1
            hook.remove()
            torch.testing.assert_close(contents(ours, optimizer), before, rtol=0, atol=0)
        assert advance(ours, optimizer, step) == 0
        advance(torchs, stock, step)
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["Adagrad", "AdamW"])
def test_where_torch_has_no_kernel_that_skips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Adagrad on a GPU with torch 2.11."""
    monkeypatch.setattr(torch_optimizer, "can_skip", lambda *_: False)
    optimizer = TorchOptimizerConfig(name).build(network())
    assert not optimizer.param_groups[0]["fused"]
    test_takes_torchs_steps(name, OPTIONS[name])


def spoil(module: Any) -> None:
    module[1].bias.grad[2] = math.nan


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
@pytest.mark.parametrize("adapt", [False, True])
def test_resumes_bit_for_bit(name: str, options: tuple[str, ...], adapt: bool) -> None:
    torch.set_default_dtype(torch.float32)
    config = TorchOptimizerConfig(name, options, adapt=adapt)
    module, resumed = network(), network()
    optimizer, other = config.build(module), config.build(resumed)
    assert optimizer.state.keys() == set(module.parameters())  # before any step
    for step in range(3):
        advance(module, optimizer, step)
    resumed.load_state_dict(module.state_dict())
    set_optimizer_state_dict(resumed, other, deepcopy(get_optimizer_state_dict(module, optimizer)))
    for step in range(3, 6):
        advance(module, optimizer, step)
        advance(resumed, other, step)
    torch.testing.assert_close(
        contents(module, optimizer), contents(resumed, other), rtol=0, atol=0
    )


def test_sgd_with_adapt_is_lars() -> None:
    ours, lars = network(), network()
    config = TorchOptimizerConfig("SGD", ("momentum=0.9",), weight_decay=0.1, adapt=True)
    optimizer, other = config.build(ours), LARSConfig(weight_decay=0.1).build(lars)
    for step in range(4):
        advance(ours, optimizer, step, lr=2.0)
        advance(lars, other, step, lr=2.0)
    for p, q in zip(ours.parameters(), lars.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", ["RMSprop", "AdamW"])
def test_adapted_gradients_enter_torchs_optimizer(name: str) -> None:
    """Its own weight decay is off, because the direction has it, also where it is decoupled."""
    ours, torchs = network(), network()
    config = TorchOptimizerConfig(name, weight_decay=0.1, adapt=True, trust_coefficient=0.01)
    optimizer, stock = config.build(ours), make_stock(name, (), torchs, 0.0)

    def adapt(*_: object) -> None:
        for p in torchs.parameters():
            if p.ndim > 1:
                assert p.grad is not None
                u: Tensor = p.grad + 0.1 * p.detach()
                p.grad = u * 0.01 * p.detach().norm() / u.norm()

    stock.register_step_pre_hook(adapt)
    for step in range(4):
        advance(ours, optimizer, step)
        advance(torchs, stock, step)
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "slots"), [("Adam", 2), ("RMSprop", 1), ("ASGD", 1), ("Rprop", 2), ("Adafactor", 0)]
)
def test_slots_count_the_state_of_a_weight(name: str, slots: int) -> None:
    assert TorchOptimizerConfig(name).slots == slots


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (("LBFGS",), "optimizer.name 'LBFGS': cannot be used here, because it evaluates the loss"),
        (("SparseAdam",), "because it takes sparse gradients only"),
        (("Muon",), "because it moves matrices only"),
        (("rmsprop",), "torch.optim has no such optimizer: did you mean RMSprop?"),
        (("lars_adam",), "did you mean Adam with --optimizer.adapt?"),
        (("Optimizer",), "torch.optim has no such optimizer"),
        (("lr_scheduler",), "torch.optim has no such optimizer"),
        (("lamb",), "the nearest is Adam with --optimizer.adapt"),
        (("momentum",), "write SGD and --optimizer.options momentum=0.9"),
        (("lars_momentum",), "--optimizer.options momentum=0.9 with --optimizer.adapt"),
        (("",), "optimizer.name '': torch.optim has no such optimizer"),
        (("a\x1b[2J\n",), r"optimizer.name 'a\x1b[2J\n': torch.optim has no such"),
        (
            ("RMSprop", ("alfa=0.9",)),
            "no such option: did you mean alpha? it has alpha, eps",
        ),
        (("RMSprop", ("0.9",)), "optimizer.options '0.9': write KEY=VALUE, such as alpha=0.99"),
        (("RMSprop", ("alpha=0.9", "alpha=0.8")), "alpha is given twice"),
        (("RMSprop", ("lr=0.9",)), "the schedule sets it: give --schedule.base-lr"),
        (("RMSprop", ("weight_decay=1",)), "give --optimizer.weight-decay"),
        (("RMSprop", ("capturable=True",)), "the engine sets it"),
        (("RMSprop", ("centered=yes",)), "optimizer.options 'centered=yes': takes True or False"),
        (("RMSprop", ("alpha=high",)), "takes a number"),
        (("RMSprop", ("alpha=nan",)), "takes a number"),
        (("RMSprop", ("alpha=-1",)), "optimizer.options alpha=-1: RMSprop says: Invalid alpha"),
        (("Adam", ("betas=0.9",)), "takes 2 numbers, such as (0.9, 0.999)"),
        (("Adam", ("betas=(0.9,0.9,0.9)",)), "takes 2 numbers, such as (0.9, 0.999)"),
        (("SGD", ("nesterov=True",)), "SGD says: Nesterov momentum requires"),
        (("SGD", ("momentum=0.9", "dampening=0.1")), "torch leaves it out in the first step"),
        (("Rprop", (), 0.1), "optimizer.weight_decay 0.1: Rprop has none"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_line(config: tuple[Any, ...], text: str) -> None:
    recipe = Recipe(run="x", optimizer=TorchOptimizerConfig(*config))
    with pytest.raises(InputError) as error:
        recipe._check_optimizer()
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_tensors_are_not_shared_out() -> None:
    config = TorchOptimizerConfig("Adafactor")
    config.check(spread=False)
    with pytest.raises(InputError, match=r"looks at whole tensors.*use --parallel\.strategy ddp"):
        config.check(spread=True)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(InputError, match=r"give --optimizer\.momentum 0\.9"):
        SGDConfig(momentum=0.0, nesterov=True).check()
