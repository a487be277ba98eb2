"""Three complete updates against the official implementation's figures (step_r18.npz).

The update is made of the functions that the trainer uses. The figures' target also has a predictor
and a classifier, which no loss uses; ours leaves them out, and so do these comparisons.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.method.byol import BYOLConfig, Online, Target, byol_loss, pair_parameters, update_target
from engine.method.lars import LARSConfig
from engine.method.norm import BatchNorm, RunningStatistics
from engine.method.resnet import ResNetConfig
from tests.helpers.golden_files import deviation, golden

pytestmark = pytest.mark.versions

Tensors = dict[str, Tensor]
BATCH = 8
NOT_IN_TARGET = ("predictor.", "classifier.")
# A bias before a batch norm has no effect: its gradient is rounding around an exact zero. (The
# target's still moves, towards the online network's.)
NO_EFFECT = ("projector.0.bias", "predictor.0.bias")

# Figures above 4096 elements were rounded to 16 bits, 1.5e-5 of an entry; the others to float32,
# 6e-8 (a half unit in the last place). Our float64 adds 1e-13 to either.
ROUNDED = 1.5e-5
SINGLE = 6e-8


@dataclass(frozen=True)
class Case:
    """One set of figures in the file, and how its large deltas were thinned out."""

    prefix: str = ""
    dtype: torch.dtype = torch.float64
    projection_shortcut: bool = False
    stride: int = 8
    thinned_above: int = 20_000


@dataclass
class Replay:
    """What was seen in our three steps; the lists have one entry for each step."""

    positions: dict[str, int]  # values per channel in one view, of every norm
    online: list[Tensors] = field(default_factory=list)
    target: list[Tensors] = field(default_factory=list)
    log: list[dict[str, float]] = field(default_factory=list)
    gradients: Tensors = field(default_factory=dict)  # of step 1
    forward: Tensors = field(default_factory=dict)  # of step 1
    evaluated: Tensors = field(default_factory=dict)  # after step 3


STRICT = Case()
SLOW = Case("lr0.02/", stride=16, thinned_above=4_000)
SLOW_FLOAT32 = Case("lr0.02/", torch.float32, stride=16, thinned_above=4_000)
PROJECTION = Case("proj/", projection_shortcut=True)


def start(network: str, name: str, prefix: str) -> Tensor:
    """The initial value of a parameter."""
    file = golden("step_r18")
    where = prefix if f"{prefix}{network}0/{name}" in file else ""
    value = file[f"{where}{network}0/{name}"]
    if value.dtype == torch.int8:
        return value * file[f"{where}{network}0_scale/{name}"]
    return value


def networks(case: Case) -> tuple[Online, Target]:
    """Both networks in the state in which the official run began."""
    encoder = ResNetConfig(18, width=0.25, projection_shortcut=case.projection_shortcut)
    config = BYOLConfig(encoder, hidden=128, projection=32)
    online, target = Online(config, classes=10), Target(config)
    for module, network in ((online, "online"), (target, "target")):
        for name, p in module.named_parameters():
            p.data.copy_(start(network, official(name), case.prefix))
    return online.to(case.dtype), target.to(case.dtype)


def official(name: str) -> str:
    return name.removeprefix("encoder.")


def snapshot(module: nn.Module) -> Tensors:
    return {official(name): value.clone() for name, value in module.state_dict().items()}


def images(dtype: torch.dtype) -> Tensor:
    """Both views, stacked and normalized: [2B, 3, 65, 65]."""
    file = golden("step_r18")
    views = torch.cat((file["view1"], file["view2"])).to(dtype) / 256
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=dtype)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=dtype)[:, None, None]
    return (views - mean) / std


def watch(module: nn.Module, name: str, into: Tensors) -> None:
    """Keep the output of the module's first forward under `name`."""

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        into.setdefault(name, output.detach().clone())

    module.register_forward_hook(keep)


def debiased(state: Tensors, norm: str, positions: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Torch's running statistics -> the official debiased ones, of variances divided by n."""
    left = 0.9 ** int(state[f"{norm}.num_batches_tracked"])  # share of the first mean 0, variance 1
    n = positions[norm]
    mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
    return mean / (1 - left), (variance - left) / (1 - left) * (n - 1) / n


def replay(
    case: Case,
    fault: Callable[[Online, Target], None] | None = None,
    target_first: bool = False,
    steps: int = 3,
) -> Replay:
    """Steps from the official start; `fault` and `target_first` plant mistakes."""
    file = golden("step_r18")
    hyper = f"{case.prefix}hyper" if f"{case.prefix}hyper" in file else "hyper"
    lr, tau, weight_decay, momentum, trust = file[hyper].tolist()
    online, target = networks(case)
    if fault is not None:
        fault(online, target)
    optimizer = LARSConfig(momentum, weight_decay, trust).build(online)
    for group in optimizer.param_groups:
        group["lr"] = lr
    views, labels = images(case.dtype), file["labels"].long()

    outputs: Tensors = {}
    for name, module in online.named_modules():
        if isinstance(module, BatchNorm):
            watch(module, name, outputs)
    watch(online.projector, "online/projection", outputs)
    watch(online.predictor, "online/prediction", outputs)
    watch(target.projector, "target/projection", outputs)

    statistics = RunningStatistics([online, target])

    def follow() -> None:
        update_target(*pair_parameters(target, online), torch.tensor(1 - tau, dtype=case.dtype))

    run = Replay({})
    for step in range(steps):
        optimizer.zero_grad()
        output = online(views)
        per_row = byol_loss(output.prediction, target(views))
        classification = F.cross_entropy(output.logits, labels)
        torch.autograd.backward(per_row.mean() + classification)
        if step == 0:
            run.gradients = {
                official(name): p.grad.clone()
                for name, p in online.named_parameters()
                if p.grad is not None
            }
            run.forward = {name: outputs[name] for name in outputs if "/" in name}
            run.forward["online/logits_view1"] = output.logits.detach()
        if target_first:
            follow()
        optimizer.step()
        if not target_first:
            follow()
        statistics.note()
        statistics.apply()

        run.online.append(snapshot(online))
        run.target.append(snapshot(target))
        ranks = output.logits.argsort(dim=1, descending=True) == labels[:, None]  # [B, classes]
        run.log.append(
            {
                "repr_loss": per_row.mean().item(),
                "classif_loss": classification.item(),
                "loss": (per_row.mean() + classification).item(),
                "top1_accuracy": ranks[:, :1].sum().item() / BATCH,
                "top5_accuracy": ranks[:, :5].sum().item() / BATCH,
            }
        )
    run.positions = {
        official(name): output.numel() // output.shape[1] // 2
        for name, output in outputs.items()
        if "/" not in name
    }
    run.evaluated = evaluate(online, run, views[:BATCH])
    return run


@torch.no_grad()
def evaluate(online: Online, run: Replay, views: Tensor) -> Tensors:
    """Outputs in evaluation mode, by the running statistics that the official one uses."""
    for name, module in online.eval().named_modules():
        if isinstance(module, BatchNorm):
            mean, variance = debiased(run.online[-1], official(name), run.positions)
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)
    assert online.classifier is not None
    features = online.encoder(views)
    projection = online.projector(features)
    return {
        "projection": projection,
        "prediction": online.predictor(projection),
        "logits": online.classifier(features),
    }


faultless = cache(replay)


def figures(prefix: str) -> Tensors:
    """The arrays below `prefix`, by the rest of their names."""
    return {
        key.removeprefix(prefix): value
        for key, value in golden("step_r18").items()
        if key.startswith(prefix)
    }


def deltas(run: Replay, case: Case, network: str, step: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Ours and the official change of every parameter that both networks have, thinned out."""
    states = run.online if network == "online" else run.target
    pairs = {}
    for name, exact in figures(f"{case.prefix}{network}{step}_delta/").items():
        if network == "target" and name.startswith(NOT_IN_TARGET):
            continue
        value = states[step - 1][name]
        stride = case.stride if value.numel() > case.thinned_above else 1
        change = value - start(network, name, case.prefix).to(case.dtype)
        pairs[name] = (change[::stride], exact)
    return pairs


def tolerance(exact: Tensor) -> float:
    return ROUNDED if exact.numel() > 4096 else SINGLE


def worst(run: Replay) -> float:
    """The largest deviation of a change in the first strict step, in units of its tolerance."""
    return max(
        deviation(value, exact) / tolerance(exact)
        for network in ("online", "target")
        for name, (value, exact) in deltas(run, STRICT, network, 1).items()
        if network == "target" or name not in NO_EFFECT
    )


@pytest.mark.parametrize("case", [STRICT, SLOW, PROJECTION], ids=["strict", "slow", "projection"])
def test_log(case: Case) -> None:
    for step, seen in enumerate(faultless(case).log, start=1):
        official_log = figures(f"{case.prefix}log{step}/")
        for name, value in seen.items():
            # Stored in float64; an independent replay agrees to 1e-14 of the loss.
            assert value == pytest.approx(official_log[name].item(), rel=1e-12), (step, name)


def test_first_forward() -> None:
    """All outputs at step 1, view by view; the file's small arrays are float32."""
    forward = faultless(STRICT).forward
    for name in ("online/projection", "online/prediction", "target/projection"):
        for view, value in enumerate(forward[name].chunk(2), start=1):
            exact = golden("step_r18")[f"forward1/{name}_view{view}"]
            assert deviation(value, exact) <= SINGLE, (name, view)
    exact = golden("step_r18")["forward1/online/logits_view1"]
    assert deviation(forward["online/logits_view1"], exact) <= SINGLE


def test_first_gradient() -> None:
    gradients, exact = faultless(STRICT).gradients, figures("grad1/")
    assert gradients.keys() == exact.keys()
    for name, value in gradients.items():
        if name in NO_EFFECT:
            assert value.abs().max() < 1e-14
        else:
            assert deviation(value, exact[name]) <= tolerance(exact[name]), name


def test_first_gradient_with_projection() -> None:
    gradients = faultless(PROJECTION).gradients
    norms, exact = figures("proj/grad1_norm/"), figures("proj/grad1/")
    assert gradients.keys() == norms.keys()
    for name, value in gradients.items():
        # Norms are stored in float64: an independent replay's gradients agree to 1.1e-13.
        expected = pytest.approx(norms[name].item(), rel=1e-11, abs=1e-14)
        assert value.norm().item() == expected, name
    assert "layer1.0.downsample.0.weight" in exact
    for name in exact:
        assert deviation(gradients[name], exact[name]) <= tolerance(exact[name]), name


@pytest.mark.parametrize("network", ["online", "target"])
@pytest.mark.parametrize(
    ("case", "step"),
    [(STRICT, 1), (STRICT, 3), (SLOW, 1), (SLOW, 3), (PROJECTION, 3)],
    ids=["strict-1", "strict-3", "slow-1", "slow-3", "projection-3"],
)
def test_parameter_changes(case: Case, step: int, network: str) -> None:
    pairs = deltas(faultless(case), case, network, step)
    if case != PROJECTION:  # whose figures are of the first layers only
        states = faultless(case).online if network == "online" else faultless(case).target
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        assert pairs.keys() == {name for name in states[0] if not name.endswith(buffers)}
    for name, (value, exact) in pairs.items():
        if network == "online" and name in NO_EFFECT:
            assert value.abs().max() < 1e-13
        else:
            assert deviation(value, exact) <= tolerance(exact), name


@pytest.mark.parametrize("network", ["online", "target"])
@pytest.mark.parametrize(("case", "step"), [(STRICT, 1), (STRICT, 2), (STRICT, 3), (SLOW, 3)])
def test_running_statistics(case: Case, step: int, network: str) -> None:
    run = faultless(case)
    state = (run.online if network == "online" else run.target)[step - 1]
    exact = figures(f"{case.prefix}{network}_bn{step}/")
    counter = 2 * step  # one update for each view
    norms = {name.rpartition("/")[0] for name in exact}
    if network == "target":
        norms = {norm for norm in norms if not norm.startswith(NOT_IN_TARGET)}
    assert norms == {name.removesuffix(".running_var") for name in state if "running_var" in name}
    for norm in norms:
        assert state[f"{norm}.num_batches_tracked"] == counter
        for name, value in zip(("mean", "var"), debiased(state, norm, run.positions), strict=True):
            assert deviation(value, exact[f"{norm}/{name}_average"]) <= SINGLE, (norm, name)
            hidden = value * (1 - 0.9**counter)
            assert deviation(hidden, exact[f"{norm}/{name}_hidden"]) <= SINGLE, (norm, name)


@pytest.mark.parametrize("case", [STRICT, SLOW], ids=["strict", "slow"])
def test_evaluation(case: Case) -> None:
    for name, exact in figures(f"{case.prefix}eval3/online/").items():
        assert deviation(faultless(case).evaluated[name], exact) <= SINGLE, name


def test_float32() -> None:
    """The well-conditioned case in float32, against the official float64 figures."""
    run = faultless(SLOW_FLOAT32)
    for step, seen in enumerate(run.log, start=1):
        # Official float32 is within 4.1e-6.
        exact = golden("step_r18")[f"lr0.02/log{step}/loss"].item()
        assert seen["loss"] == pytest.approx(exact, rel=4.1e-6)
    errors = [
        deviation(value, exact)
        for network in ("online", "target")
        for step in (1, 3)
        for name, (value, exact) in deltas(run, SLOW_FLOAT32, network, step).items()
        if network == "target" or name not in NO_EFFECT
    ]
    # Most of it is float32 itself: parameters of size 1 that change by 5e-5 keep 3 digits of it.
    # A plain replay has up to 2.6e-3, median 3e-5.
    assert max(errors) <= 4e-3
    assert sorted(errors)[len(errors) // 2] <= 5e-5


def mixed_views(online: Online, target: Target) -> None:
    for module in (*online.modules(), *target.modules()):
        if isinstance(module, BatchNorm):
            module.views = 1
            module.batch_mean, module.batch_var = module.batch_mean[:1], module.batch_var[:1]


def test_figures_tell_mistakes() -> None:
    """Planted mistakes leave the tolerances far behind, in the first step already."""
    assert worst(faultless(STRICT)) <= 1
    assert worst(replay(STRICT, target_first=True, steps=1)) > 1000
    assert worst(replay(STRICT, fault=mixed_views, steps=1)) > 1000
