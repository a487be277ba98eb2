"""The trainer: a step against an independent replay, determinism, resuming, what it leaves."""

import contextlib
import copy
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.byol import update_target
from engine.checkpoint import CheckpointConfig
from engine.debug import debug_step
from engine.metrics import LogConfig
from engine.norm import BatchNorm
from engine.probe import ProbeConfig
from engine.recipe import Recipe
from engine.schedule import ScheduleConfig
from engine.trainer import Trainer
from shards.errors import InputError
from shards.index import Index
from shards.loader import DataConfig
from shards.order import BatchConfig
from tests import parity, tiny
from tests.conftest import PackFiles, draw_photo

TIMING = {"images_per_second", "data_wait"}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def comparable(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines(run)]


def train(recipe: Recipe) -> Trainer:
    trainer = Trainer(recipe)
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def whole_run(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the first step to the last, undisturbed."""
    run = tmp_path_factory.mktemp("whole")
    train(tiny.recipe(tiny_data, run))
    return run


# The step against stock PyTorch ----------------------------------------------------------------


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
                worst = max(worst, ((value - expected[name]).abs().max() / scale).item())
    return worst


def run_both(data: DataConfig, run: Path, steps: int = 4) -> tuple[float, float]:
    """Train and replay the same batches in float64: (worst loss, worst state) difference."""
    trainer = Trainer(tiny.recipe(data, run, precision="fp64"))
    # A zero learning rate at step 0 would hide what the first update does.
    trainer.step = first = 2
    replay = Replay(trainer)
    batches = trainer.batches()
    worst_loss = 0.0
    try:
        for k in range(first, first + steps):
            batch = next(batches)
            output = trainer.train_step(batch)
            trainer.step += 1
            view1, view2 = output.images.chunk(2)
            expected = replay.step(k, view1, view2, batch.labels)
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
        statistics = torch.zeros_like(self.batch_statistics[0])
        y = self._normalise(x, *statistics)
        self.batch_statistics.copy_(statistics.expand_as(self.batch_statistics))
        return y

    monkeypatch.setattr(BatchNorm, "forward", forward)


def _views_not_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.byol import regression_loss

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


def test_micro_batches_average_gradients(tiny_data: DataConfig, tmp_path: Path) -> None:
    """Two halves: the gradient is the mean of the halves' own, the target moves once."""
    config = BatchConfig(size=16, micro=2)
    trainer = Trainer(tiny.recipe(tiny_data, tmp_path, precision="fp64", batch=config))
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
    parts = trainer._micro_batches(batch)
    assert [len(part[0]) for part in parts] == [16, 16]  # two views of 8
    trainer.train_step(batch)

    from engine.byol import byol_loss

    for views, params, labels in parts:
        images = trainer.augment(views, params)
        online = twin(images)
        loss = byol_loss(online.prediction, target(images)).mean()
        loss = loss + nn.functional.cross_entropy(online.logits, labels)
        (loss / 2).backward()
    for name, p in twin.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-12, atol=1e-14)


# Runs ------------------------------------------------------------------------------------------


def test_metrics_of_a_run(whole_run: Path) -> None:
    records = lines(whole_run)
    assert [record["step"] for record in records] == list(range(1, 21))
    steps_per_epoch = tiny.SAMPLES // 16
    for record in records:
        assert record["epoch"] == record["step"] // steps_per_epoch
        assert 0 <= record["loss"] <= 8
        assert TIMING | {"lr", "tau", "feature_std", "data_digest"} <= record.keys()
        assert ("knn_top1" in record) == (record["step"] % 5 == 0)
        assert ("online_top1" in record) == (record["step"] % 5 == 0)
    assert len({record["data_digest"] for record in records}) == len(records)
    assert any((whole_run / "tensorboard").iterdir())


def test_equal_runs_are_equal_bit_for_bit(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    train(tiny.recipe(tiny_data, tmp_path))
    assert comparable(tmp_path) == comparable(whole_run)


def test_another_seed_is_another_run(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, seed=1, steps=2))
    for ours, other in zip(comparable(tmp_path), comparable(whole_run)[:2], strict=True):
        assert ours["loss"] != other["loss"]
        assert ours["data_digest"] != other["data_digest"]


@pytest.mark.parametrize("stop", [4, 7])
def test_resumed_run_equals_the_whole_one(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path, stop: int
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, steps=stop))
    train(tiny.recipe(tiny_data, tmp_path))
    assert comparable(tmp_path) == comparable(whole_run)


def test_a_killed_run_repeats_what_was_not_saved(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, steps=7))
    # As a kill at step 7 leaves it: saved at 4, logged to 7, half a line more.
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000007")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    train(tiny.recipe(tiny_data, tmp_path))
    assert comparable(tmp_path) == comparable(whole_run)


def test_damaged_checkpoint_is_reported_and_the_one_before_taken(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, steps=8))
    (file,) = (tmp_path / "checkpoints" / "step_00000008").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train(tiny.recipe(tiny_data, tmp_path))
    output = capsys.readouterr().out
    assert "step_00000008" in output
    assert "damaged" in output
    assert "resumed at step 4" in output
    assert comparable(tmp_path) == comparable(whole_run)


def test_new_run_from_another_runs_state(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(tiny.recipe(tiny_data, first, steps=8))
    resume = CheckpointConfig(every=4, resume=str(first))
    train(tiny.recipe(tiny_data, second, checkpoint=resume))
    assert comparable(second) == comparable(whole_run)[8:]


def test_old_checkpoints_are_removed(whole_run: Path) -> None:
    names = sorted(path.name for path in (whole_run / "checkpoints").iterdir())
    assert names == ["step_00000012", "step_00000016", "step_00000020"]


def test_views_are_shown_in_tensorboard(whole_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole_run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["views"]
    assert [event.step for event in events.Images("views")] == [1, 5, 10, 15, 20]
    (losses, records) = events.Scalars("loss"), lines(whole_run)
    assert [event.step for event in losses] == [record["step"] for record in records]


def test_data_digest_tells_audited_pixels_apart(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    audited = dataclasses.replace(tiny_data, audit=True)
    train(tiny.recipe(audited, tmp_path, steps=2))
    for ours, plain in zip(comparable(tmp_path), comparable(whole_run)[:2], strict=True):
        assert ours["loss"] == plain["loss"]
        assert ours["data_digest"] != plain["data_digest"]


def test_debug_step_leaves_nothing(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, steps=2))
    before = sorted(tmp_path.rglob("*"))
    debug_step(Trainer(tiny.recipe(tiny_data, tmp_path, debug_step=True)))
    assert sorted(tmp_path.rglob("*")) == before
    report = capsys.readouterr().out
    for part in ("load", "first step", "evaluate", "save", "restore", "memory"):
        assert part in report


def test_diverged_training_stops(tiny_data: DataConfig, tmp_path: Path) -> None:
    config = tiny.recipe(
        tiny_data, tmp_path, checkpoint=CheckpointConfig(every=0), probe=ProbeConfig()
    )
    trainer = Trainer(dataclasses.replace(config, schedule=ScheduleConfig(epochs=10)))
    with torch.no_grad():
        next(trainer.online.parameters()).fill_(math.nan)
    with pytest.raises(InputError, match=r"diverged.* at step 2[01] \(loss nan, learning rate"):
        trainer.fit()
    assert not (tmp_path / "checkpoints").exists()
    assert lines(tmp_path)[-1]["loss"] is None


def test_diverged_state_is_not_saved(tiny_data: DataConfig, tmp_path: Path) -> None:
    """Also where no step is logged between two checkpoints."""
    config = tiny.recipe(
        tiny_data,
        tmp_path,
        schedule=ScheduleConfig(epochs=2, warmup_epochs=1, base_lr=1e30),
        log=LogConfig(every=1000),
        probe=ProbeConfig(),
        checkpoint=CheckpointConfig(every=1, keep=1),
    )
    with pytest.raises(InputError, match="diverged"):
        train(config)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == "step_00000001"  # at learning rate 0; the next step blows up


def test_a_skipped_step_leaves_no_trace_but_its_count(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    trainer = Trainer(tiny.recipe(tiny_data, tmp_path, precision="fp16"))
    trainer.step = 2
    with contextlib.closing(trainer.batches()) as batches:
        trainer.train_step(next(batches))
        before = copy.deepcopy(trainer.state())
        weight = trainer.online.get_parameter("projector.0.weight")
        hook = weight.register_hook(lambda grad: grad * math.inf)
        trainer.train_step(next(batches))
        hook.remove()
        after = copy.deepcopy(trainer.state())
        guards = before.pop("guard"), after.pop("guard")
        counters = [k for k in after["online"] if k.endswith("num_batches_tracked")]
        for part in ("online", "target"):
            for key in counters:  # how many were seen, not what is kept of them
                before[part].pop(key, None), after[part].pop(key, None)
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert guards[1]["scale"] == guards[0]["scale"] / 2
        assert guards[1]["skipped"] == guards[0]["skipped"] + 1
        kept = weight.detach().clone()
        trainer.train_step(next(batches))
        assert trainer.guard.skipped == guards[1]["skipped"]
        assert not torch.equal(weight, kept)


def test_labels_beyond_the_classes_are_refused(packed: Index, tmp_path: Path) -> None:
    fewer = Index(packed.url, packed.shards, packed.classes[:2])
    fewer.save()
    data = DataConfig(train=packed.url, streams=4)
    with pytest.raises(InputError, match="label 2, but the index has 2 classes"):
        train(tiny.recipe(data, tmp_path / "run", probe=ProbeConfig()))


def test_corrupt_images_are_named_once_for_the_whole_run(
    pack_files: PackFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{c}/{c}{i}.jpg": draw_photo(i, 40, 40) for c in "ab" for i in range(30)}
    files["a/a7.jpg"] = b"no image"
    url = pack_files(str(tmp_path / "data"), files).url
    data = DataConfig(train=url, val=url, streams=4)
    probe = ProbeConfig(every=2, neighbours=3)
    train(tiny.recipe(data, tmp_path / "run", probe=probe, steps=6))
    assert capsys.readouterr().out.count("a7: no JPEG, PNG or WebP image") == 1


def first_gradient(config: Recipe) -> Tensor:
    """All gradients of one step, flat, and unscaled."""
    trainer = Trainer(config)
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
