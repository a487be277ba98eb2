"""The training: what is built, and in which order; the step; the loop around it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from engine import byol, checkpoint, parallel, run
from engine.augment import augment
from engine.byol import byol_loss, update_target
from engine.metrics import MetricsLog, data_digest, feature_std
from engine.precision import autocast, parameter_dtype
from engine.probe import Probe
from engine.recipe import Recipe, method_fields
from engine.schedule import learning_rate, tau
from shards import index as indexes
from shards import storage, synthetic
from shards.errors import InputError
from shards.loader import Batch, TrainLoader
from shards.order import Order, rank_streams


class StepOutput(NamedTuple):
    """What a step leaves for the log, on the device; images, features: the last micro-batch's."""

    loss: Tensor  # [] mean over the batch, 0 to 8
    head_loss: Tensor  # [] of the online classifier, 0 without labels
    features: Tensor  # [V*b, F]
    images: Tensor  # [V*b, 3, S, S], as the network saw them
    lr: float
    tau: float


class _Timer:
    """Speed since it was made: of the steps, not of evaluations and checkpoints between them."""

    def __init__(self) -> None:
        self.steps, self._start, self._waited = 0, time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def read(self, batch: int) -> dict[str, float]:
        seconds = time.perf_counter() - self._start
        return {
            "images_per_second": self.steps * batch / seconds,
            "data_wait": self._waited / seconds,
        }


class Trainer:
    """A run in this process: data, networks and optimizer, with `step` updates done."""

    def __init__(self, recipe: Recipe) -> None:
        """Build, in this order: device, data, networks, optimizer, saved state.

        Raises InputError for what the user got wrong, before the first expensive thing.
        """
        self.recipe = recipe
        self.console = Console(highlight=False, soft_wrap=True)
        self.report = cache(self.console.print)  # each warning once
        self.device = parallel.setup(recipe.threads)

        self._draw_data()
        self.train_index = indexes.load(recipe.data.train, "data.train")
        self.val_index = indexes.load(recipe.data.val, "data.val") if recipe.data.val else None
        self.order = Order(self.train_index, recipe.seed, recipe.data.streams, recipe.batch.size)
        self._check_data()
        samples, batch = self.train_index.samples, recipe.batch.size
        self.total_steps = recipe.schedule.total_steps(samples, batch)
        self.warmup_steps = recipe.schedule.warmup_steps(samples, batch)
        self.peak_lr = recipe.schedule.peak_lr(batch)
        self.stop = self.total_steps if recipe.steps is None else recipe.steps
        self.stop = min(self.stop, self.total_steps)
        if self.total_steps < 1:
            raise InputError(
                f"schedule.epochs {recipe.schedule.epochs} of {samples} samples are less than one "
                f"step of batch.size {batch}: train for longer"
            )

        run.check(recipe, self.train_index.digest, self.report)
        commit = self._find_checkpoint()
        if not recipe.debug_step:
            run.write(recipe, self.train_index.digest)

        self.classes = len(self.train_index.classes)
        self.online, self.target = byol.build(recipe.model, self.classes, recipe.seed)
        self.online.to(self.device, parameter_dtype(recipe.precision))
        self.target.to(self.device, parameter_dtype(recipe.precision))
        self.optimizer = recipe.optimizer.build(self.online)
        self.augment: Callable[..., Tensor] = partial(augment, blur=recipe.views.ever_blur)

        self.probe = self._build_probe()
        self.step = 0
        if commit is None:
            self.baseline = self._measure_baseline()
        else:
            self.load(commit)
            self.step, self.baseline = commit.step, {}
            self.console.print(f"resumed at step {self.step} from {storage.redact(commit.url)}")
        if recipe.compile:
            parallel.compile_networks(self.online, self.target, self.console.print)
            if self.device.type == "cuda":
                self.augment = torch.compile(self.augment)

    # The step -------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> StepOutput:
        """One update: both networks see both views, the online one learns, the target follows.

        Section 3.1 and algorithm 1 of the paper. With micro-batches, gradients are averaged over
        them and everything after the backward passes happens once, as in the paper.
        """
        lr = learning_rate(self.step, self.peak_lr, self.warmup_steps, self.total_steps)
        rate = tau(self.step, self.recipe.schedule.base_tau, self.total_steps)
        micro = self.recipe.batch.micro
        loss = head_loss = torch.zeros((), device=self.device)

        for views, params, labels in self._micro_batches(batch):
            images = self.augment(views, params)  # [V*b, 3, S, S]
            with autocast(self.recipe.precision, self.device):
                online = self.online(images)
                with torch.no_grad():
                    projection = self.target(images)  # [V*b, D]
            byol_term = byol_loss(online.prediction, projection).mean()
            head_term = _head_loss(online.logits, labels)
            ((byol_term + head_term) / micro).backward()
            loss = loss + byol_term.detach() / micro
            head_loss = head_loss + head_term.detach() / micro

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_target(self.target, self.online, rate)
        return StepOutput(loss, head_loss, online.features, images, lr, rate)

    def _micro_batches(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """views [V*b, 3, S, S], parameters [V*b, P] and labels [b] of each, on the device."""
        views, params, labels = (
            tensor.to(self.device, non_blocking=True)
            for tensor in (batch.views, batch.params, batch.labels)
        )
        if self.recipe.precision == "fp64":
            views, params = views.double() / 255, params.double()
        micro = self.recipe.batch.micro
        parts = zip(
            views.chunk(micro, dim=1), params.chunk(micro, dim=1), labels.chunk(micro), strict=True
        )
        return [(v.flatten(0, 1), p.flatten(0, 1), label) for v, p, label in parts]

    # The loop -------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last step of the recipe, or of this process (`steps`)."""
        recipe, first, measured = self.recipe, self.step, {}
        log = MetricsLog(recipe.run, self.step, self.stop, self.console)
        data = self.batches()
        self.console.print(
            f"{self.train_index.samples:,} images, {self.order.steps_per_epoch:,} steps an epoch; "
            f"steps {self.step:,} to {self.stop:,} on {self.device}; blocks in memory: up to about "
            f"{data.block_memory / 2**20:,.0f} MiB"
        )
        timer = _Timer()
        try:
            while self.step < self.stop:
                with timer.waiting():
                    batch = next(data)
                output = self.train_step(batch)
                self.step += 1
                timer.steps += 1
                log.advance()

                measure = recipe.probe.every > 0 and self._due(recipe.probe.every, self.total_steps)
                if measure or self.step == first + 1:
                    views = output.images.unflatten(0, (2, -1))[:, : recipe.log.pictures]
                    log.pictures(views, self.step)  # [V, n, 3, S, S]
                if measure or self.step % recipe.log.every == 0:
                    record = self._record(output, batch) | timer.read(recipe.batch.size)
                    if measure and self.probe is not None:
                        measured = self.probe.evaluate()
                        record |= measured
                    log.write(record)
                    timer = _Timer()
                if self._due(recipe.checkpoint.every, self.stop):
                    self._check_finite(output)
                    self.save()
                    timer = _Timer()
        finally:
            data.close()
            log.close()
        self._farewell(measured)

    def _farewell(self, measured: dict[str, float]) -> None:
        say = self.console.print
        say(f"{self.step} of {self.total_steps} steps done")
        if self.baseline and measured:
            figures = self.baseline | {"trained encoder": measured["knn_top1"]}
            say("kNN accuracy on data.val:")
            for name, accuracy in figures.items():
                say(f"  {name:<18} {accuracy:6.1%}")
        if self.step:
            say(f"checkpoint    {storage.redact(checkpoint.step_url(self.recipe.run, self.step))}")
        say(f"curves, views tensorboard --logdir {storage.redact(self.recipe.run)}/tensorboard")
        if self.step < self.total_steps:
            say("the same command without --steps goes on")

    def batches(self) -> TrainLoader:
        """The batches from the next step on."""
        recipe = self.recipe
        return TrainLoader(
            self.order,
            rank_streams(recipe.data.streams, rank=0, world=1),
            recipe.views,
            recipe.data,
            micro=recipe.batch.micro,
            start=self.step,
            threads=recipe.threads,
            pin_memory=self.device.type == "cuda",
            report=self.report,
        )

    def _due(self, every: int, last: int) -> bool:
        return self.step == last or (every > 0 and self.step % every == 0)

    def _check_finite(self, output: StepOutput) -> None:
        """Before a step is logged or saved: a diverged run must not push out its good states."""
        loss = output.loss.item()
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {self.step}: training has diverged; the last "
                "checkpoint is kept: start a new run with a lower --schedule.base-lr"
            )

    def _record(self, output: StepOutput, batch: Batch) -> dict[str, Any]:
        self._check_finite(output)
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self.step // self.order.steps_per_epoch,
            "loss": output.loss.item(),
            "lr": output.lr,
            "tau": output.tau,
            "feature_std": feature_std(output.features).item(),
            "data_digest": data_digest(batch.ids, batch.crcs),
        }
        if self.classes:
            record["head_loss"] = output.head_loss.item()
        return record

    def _build_probe(self) -> Probe | None:
        """None when the recipe asks for no evaluations."""
        recipe = self.recipe
        if self.val_index is None or not (recipe.probe.every or recipe.probe.baseline):
            return None
        return Probe(
            recipe.probe,
            self.online,
            self.train_index,
            self.val_index,
            size=recipe.views.size,
            precision=recipe.precision,
            device=self.device,
            threads=recipe.threads,
            corrupt=recipe.data.corrupt,
            report=self.report,
        )

    def _measure_baseline(self) -> dict[str, float]:
        """kNN before the first step."""
        if self.probe is None or not self.recipe.probe.baseline or self.recipe.debug_step:
            return {}
        found = {
            "raw pixels": self.probe.pixels_top1(),
            "untrained encoder": self.probe.evaluate()["knn_top1"],
        }
        for name, accuracy in found.items():
            self.console.print(f"kNN of {name}: {accuracy:.1%}")
        return found

    # Saved state ----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The run's tensors. With the recipe and the step they are all there is to save."""
        optimizer = get_optimizer_state_dict(self.online, self.optimizer)
        return {
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": optimizer["state"],
        }

    def save(self) -> checkpoint.Commit:
        """Commit the state as this step's checkpoint, then remove the oldest ones."""
        recipe = self.recipe
        commit = checkpoint.save(
            recipe.run, self.step, self.state(), method_fields(recipe), self.train_index.digest
        )
        checkpoint.prune(recipe.run, recipe.checkpoint.keep)
        return commit

    def load(self, commit: checkpoint.Commit) -> None:
        """Take over a checkpoint's tensors."""
        state = self.state()
        checkpoint.load(commit, state)
        self.online.load_state_dict(state["online"])
        self.target.load_state_dict(state["target"])
        groups = get_optimizer_state_dict(self.online, self.optimizer)["param_groups"]
        set_optimizer_state_dict(
            self.online,
            self.optimizer,
            optim_state_dict={"state": state["optimizer"], "param_groups": groups},
        )

    def _find_checkpoint(self) -> checkpoint.Commit | None:
        """This run's newest checkpoint, or the one to start from, if it is of this recipe."""
        resume, mend = self.recipe.checkpoint.resume, "give another --run"
        commit = checkpoint.latest(self.recipe.run, self.report)
        if commit is None and resume:
            commit = checkpoint.find(resume, self.report)
            mend = "give another --checkpoint.resume"
        if commit is not None:
            digest = self.train_index.digest
            run.refuse_other(
                self.recipe, digest, commit.url, commit.method, commit.index_digest, mend
            )
        return commit

    # Data -----------------------------------------------------------------------------------

    def _draw_data(self) -> None:
        data, size = self.recipe.data, self.recipe.views.size
        for url, samples, seed in ((data.train, data.draw, 0), (data.val, data.draw // 4, 1)):
            if url and samples and not storage.exists(storage.join(url, indexes.NAME)):
                self.console.print(f"drawing {samples} images to {storage.redact(url)}")
                synthetic.write(url, samples, size, seed)

    def _check_data(self) -> None:
        micro = self.recipe.batch.micro
        if self.order.rows % micro:
            raise InputError(
                f"batch.micro {micro} does not divide the {self.order.rows} rows that each of "
                f"data.streams {self.order.streams} gives to a batch: use fewer streams"
            )
        if self.val_index is None:
            return
        train, val = self.train_index.classes, self.val_index.classes
        if (self.recipe.probe.every or self.recipe.probe.baseline) and not (train and val):
            name = "data.val" if train else "data.train"
            raise InputError(
                f"evaluations are on but {name} has no labels: use --probe.every 0 "
                "--probe.no-baseline, or pack the images in one folder for each class"
            )
        if train and val and train != val:
            odd = sorted(set(train) ^ set(val)) or ["their order"]
            raise InputError(
                f"data.val has other classes than data.train ({len(val)} and {len(train)}, "
                f"differing in {odd[0]}): pack both with the same class folders"
            )


def _head_loss(logits: Tensor | None, labels: Tensor) -> Tensor:
    """Cross-entropy [] of the online classifier, over the rows that have a label (not -1)."""
    if logits is None:
        return torch.zeros((), device=labels.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = (labels >= 0).sum().clamp(min=1)
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / known
