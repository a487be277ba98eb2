"""One step of the trainer: against an independent replay, in micro-batches, in half precision."""

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.method.byol import update_target
from engine.method.norm import BatchNorm
from engine.method.schedule import learning_rate
from engine.recipe import Recipe
from engine.trainer import Trainer
from shards.loader import DataConfig
from shards.order import BatchConfig
from tests.helpers import tiny
from tests.helpers.training import open_trainer
from tests.whole import parity

pytestmark = pytest.mark.versions


def stock_norms(network: nn.Module) -> nn.Module:
    """The network with torch's own batch norms, for one view at a time."""
    for name, child in network.named_children():
        if isinstance(child, BatchNorm):
            channels = len(child.weight)
            is_mlp = "projector" in type(network).__name__ or isinstance(network, nn.Sequential)
            linear = is_mlp and isinstance(network[0], nn.Linear)  # type: ignore[index]
            norm = nn.BatchNorm1d(channels) if linear else nn.BatchNorm2d(channels)
            norm.to(torch.float64).load_state_dict(child.state_dict())
            setattr(network, name, norm)
        else:
            stock_norms(child)
    return network


class Replay:
    """BYOL written down once more: one forward a view, torch's norms, loops over parameters."""

    def __init__(self, trainer: Trainer) -> None:
        self.online = stock_norms(copy.deepcopy(trainer.online))
        self.target = stock_norms(copy.deepcopy(trainer.target))
        self.recipe = trainer.recipe
        self.total, self.warmup = trainer.total_steps, trainer.warmup_steps
        self.momentum: dict[str, Tensor] = {}

    def step(self, k: int, view1: Tensor, view2: Tensor, labels: Tensor) -> float:
        online: Any = self.online
        target: Any = self.target
        features = [online.encoder(view) for view in (view1, view2)]
        q1, q2 = (online.predictor(online.projector(f)) for f in features)
        with torch.no_grad():
            z1, z2 = (target.projector(target.encoder(view)) for view in (view1, view2))
        cosine = nn.functional.cosine_similarity
        loss = (4 - 2 * cosine(q1, z2) - 2 * cosine(q2, z1)).mean()
        logits = online.classifier(features[0].detach())
        (loss + nn.functional.cross_entropy(logits, labels)).backward()

        schedule, lars = self.recipe.schedule, self.recipe.optimizer
        peak = schedule.base_lr * len(labels) / 256
        if k < self.warmup:
            lr = peak * k / self.warmup
        else:
            progress = (k - self.warmup) / (self.total - self.warmup)
            lr = 0.5 * peak * (1 + math.cos(math.pi * progress))
        with torch.no_grad():
            for name, p in online.named_parameters():
                update = p.grad
                if p.ndim > 1:
                    update = update + lars.weight_decay * p
                    if p.norm() > 0 and update.norm() > 0:
                        update = update * 1e-3 * p.norm() / update.norm()
                self.momentum[name] = 0.9 * self.momentum.get(name, 0) + update
                p -= lr * self.momentum[name]
                p.grad = None
            tau = 1 - (1 - schedule.base_tau) * (math.cos(math.pi * k / self.total) + 1) / 2
            moved = dict(online.named_parameters())
            for name, p in target.named_parameters():
                p.copy_(tau * p + (1 - tau) * moved[name])
        return float(loss.detach())


def worst_difference(trainer: Trainer, replay: Replay) -> float:
    """The largest difference of any parameter or running statistic, relative to its tensor."""
    worst = 0.0
    for ours, theirs in ((trainer.online, replay.online), (trainer.target, replay.target)):
        expected = theirs.state_dict()
        for name, value in ours.state_dict().items():
            if value.is_floating_point():
                scale = expected[name].abs().max().clamp(min=1e-3)
                difference = ((value - expected[name]).abs().max() / scale).item()
                assert math.isfinite(difference), name  # nan is no number's maximum
                worst = max(worst, difference)
    return worst


def run_both(data: DataConfig, run: Path, steps: int = 4) -> tuple[float, float]:
    """Train and replay the same batches in float64: (worst loss, worst state) difference."""
    trainer = open_trainer(tiny.recipe(data, run, precision="fp64"))
    # A zero learning rate at step 0 would hide what the first update does.
    trainer.step = first = 2
    replay = Replay(trainer)
    batches = trainer.batches()
    worst_loss = 0.0
    try:
        for k in range(first, first + steps):
            batch = next(batches)
            output = trainer.train_step(batch)
            view1, view2 = output.images.chunk(2)
            expected = replay.step(k, view1, view2, batch.labels)
            assert math.isfinite(output.loss.item())
            worst_loss = max(worst_loss, abs(output.loss.item() - expected))
    finally:
        batches.close()
    return worst_loss, worst_difference(trainer, replay)


# Four float64 steps of a chaotic little network: rounding of 1e-16 has grown to 1e-12 or so.
TOLERANCE = 1e-9


def test_step_equals_a_replay_in_stock_pytorch(tiny_data: DataConfig, tmp_path: Path) -> None:
    loss, state = run_both(tiny_data, tmp_path)
    assert loss < TOLERANCE
    assert state < TOLERANCE


def _target_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target follows where the online network was, before its step."""
    before: list[list[Tensor]] = []

    def late(target: list[Tensor], online: list[Tensor], step: Tensor) -> None:
        update_target(target, before[-1] if before else online, step)
        before.append([p.detach().clone() for p in online])

    monkeypatch.setattr("engine.trainer.update_target", late)


def _mixed_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: BatchNorm, x: Tensor) -> Tensor:
        mean, variance = torch.zeros_like(self.batch_mean[0]), torch.zeros_like(self.batch_var[0])
        y = self._normalize(x, mean, variance)
        self.batch_mean.copy_(mean.expand_as(self.batch_mean))
        self.batch_var.copy_(variance.expand_as(self.batch_var))
        return y

    monkeypatch.setattr(BatchNorm, "forward", forward)


def _views_not_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.method.byol import regression_loss

    def same_view(prediction: Tensor, projection: Tensor) -> Tensor:
        q1, q2 = prediction.chunk(2)
        z1, z2 = projection.detach().chunk(2)
        return regression_loss(q1, z1) + regression_loss(q2, z2)

    monkeypatch.setattr("engine.trainer.byol_loss", same_view)


@pytest.mark.parametrize("fault", [_target_first, _mixed_statistics, _views_not_crossed])
def test_replay_finds_planted_faults(
    fault: Callable[[pytest.MonkeyPatch], None],
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    loss, state = run_both(tiny_data, tmp_path)
    assert max(loss, state) > 1e3 * TOLERANCE


def test_a_step_counts_itself(tiny_data: DataConfig, tmp_path: Path) -> None:
    """A loop of one's own moves along the schedule without touching the trainer."""
    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path))
    with contextlib.closing(trainer.batches()) as batches:
        outputs = [trainer.train_step(next(batches)) for _ in range(3)]
    assert trainer.step == 3
    expected = [learning_rate(step, trainer.peak_lr, 3, 20) for step in range(3)]
    assert [output.lr for output in outputs] == expected
    assert len(set(expected)) == 3


def test_micro_batches_average_gradients(tiny_data: DataConfig, tmp_path: Path) -> None:
    """Two halves: the gradient is the mean of the halves' own, the target moves once."""
    config = BatchConfig(size=16, micro=2)
    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, precision="fp64", batch=config))
    trainer.step = 2
    batches = trainer.batches()
    batch = next(batches)
    batches.close()
    twin = copy.deepcopy(trainer.online)
    seen: dict[str, Tensor] = {}

    def record(*_: object) -> None:
        seen.update({n: p.grad.clone() for n, p in trainer.online.named_parameters()})  # type: ignore[union-attr]

    trainer.optimizer.register_step_pre_hook(record)
    target = copy.deepcopy(trainer.target)
    parts = trainer._micro_batches(*trainer.copies.take(batch.views, batch.params, batch.labels))
    assert [len(part[0]) for part in parts] == [16, 16]  # two views of 8
    trainer.train_step(batch)

    from engine.method.byol import byol_loss

    for views, params, labels in parts:
        images = trainer.augment(views, params)
        online = twin(images)
        loss = byol_loss(online.prediction, target(images)).mean()
        loss = loss + nn.functional.cross_entropy(online.logits, labels)
        (loss / 2).backward()
    for name, p in twin.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-12, atol=1e-14)


def first_gradient(config: Recipe) -> Tensor:
    """All gradients of one step, flat, and unscaled."""
    trainer = open_trainer(config)
    trainer.step = 2
    if trainer.guard.scale is not None:
        trainer.guard.scale.fill_(1024)  # where no step of so small a network is skipped
    seen: list[Tensor] = []

    def look(*_: object) -> None:
        seen.extend(p.grad.flatten().clone() for p in trainer.online.parameters())  # type: ignore[union-attr]

    trainer.optimizer.register_step_pre_hook(look)
    with contextlib.closing(trainer.batches()) as batches:
        trainer.train_step(next(batches))
    assert trainer.guard.skipped == 0
    for value in [*trainer.online.state_dict().values(), *trainer.target.state_dict().values()]:
        assert value.dtype in (torch.float32, torch.int64)
    return torch.cat(seen) / (1 if trainer.guard.scale is None else trainer.guard.scale)


@pytest.mark.parametrize(("precision", "within"), [("bf16", 0.1), ("fp16", 0.02)])
def test_half_precision_is_near(
    tiny_data: DataConfig, tmp_path: Path, precision: str, within: float
) -> None:
    # Rounding flips signs at ReLU's kinks, which moves stock PyTorch's gradients by a third too.
    with patch("torch.relu", F.softplus):
        exact, found = (
            first_gradient(parity.recipe(tiny_data, str(tmp_path / name), precision=name))
            for name in ("fp32", precision)
        )
    error = (found - exact).norm() / exact.norm()
    print(f"{precision}: {error:.3g}")
    assert 0 < error <= within
