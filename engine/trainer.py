"""The training: what is built, and in which order; the step; the loop around it."""

import json
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from engine import byol, checkpoint, parallel
from engine.augment import augment, normalize
from engine.byol import byol_loss, update_target
from engine.metrics import MetricsLog, data_digest, effective_rank, feature_std
from engine.precision import autocast, parameter_dtype
from engine.probe import Features, extract, knn_top1, top1
from engine.recipe import Recipe, differences, flatten, method_fields
from engine.schedule import learning_rate, tau
from shards import index as indexes
from shards import storage, synthetic
from shards.errors import InputError
from shards.evaluation import center_crops
from shards.index import Index
from shards.loader import Batch, TrainLoader
from shards.order import Order, rank_streams

RECIPE = "recipe.json"


class StepOutput(NamedTuple):
    """What a step leaves for the log, on the device; images and features of its last micro-batch."""

    loss: Tensor  # [] mean over the batch, 0 to 8
    head_loss: Tensor  # [] of the online classifier, 0 without labels
    features: Tensor  # [V*b, F]
    images: Tensor  # [V*b, 3, S, S], as the network saw them
    lr: float
    tau: float


class Trainer:
    """A run in this process: data, networks and optimizer, with `step` updates done."""

    def __init__(self, recipe: Recipe) -> None:
        """Build, in this order: device, data, networks, optimizer, saved state, log.

        Raises InputError for what the user got wrong, before the first expensive thing.
        """
        self.recipe = recipe
        self.console = Console(highlight=False, soft_wrap=True)
        self.device = parallel.setup(recipe.threads)

        self._draw_data()
        self.train_index = indexes.load(recipe.data.train, "data.train")
        self.val_index = indexes.load(recipe.data.val, "data.val") if recipe.data.val else None
        self.order = Order(self.train_index, recipe.seed, recipe.data.streams, recipe.batch.size)
        self._check_data()
        self._check_run()

        samples, batch = self.train_index.samples, recipe.batch.size
        self.total_steps = recipe.schedule.total_steps(samples, batch)
        self.warmup_steps = recipe.schedule.warmup_steps(samples, batch)
        self.peak_lr = recipe.schedule.peak_lr(batch)
        self.stop = min(recipe.steps or self.total_steps, self.total_steps)

        self.classes = len(self.train_index.classes)
        self.online, self.target = byol.build(recipe.model, self.classes, recipe.seed)
        self.online.to(self.device, parameter_dtype(recipe.precision))
        self.target.to(self.device, parameter_dtype(recipe.precision))
        self.optimizer = recipe.optimizer.build(self.online)
        self.augment: Callable[..., Tensor] = partial(augment, blur=recipe.views.ever_blur)

        if recipe.probe.baseline:
            self._measure_baseline()
        self.step = self._restore()
        self._write_recipe()
        if recipe.compile:
            parallel.compile_networks(self.online, self.target, self.console.print)
            if self.device.type == "cuda":
                self.augment = torch.compile(self.augment)
        self.log = MetricsLog(recipe.run, self.step, self.stop, self.console)

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
        every = self.recipe.log.every
        data = self.batches()
        try:
            clock, waited, steps = time.perf_counter(), 0.0, 0
            while self.step < self.stop:
                waited -= time.perf_counter()
                batch = next(data)
                waited += time.perf_counter()
                output = self.train_step(batch)
                self.step, steps = self.step + 1, steps + 1
                self.log.advance()

                evaluate = self._due(self.recipe.probe.every, self.total_steps)
                if steps == 1 or evaluate:
                    self._show_views(output)
                if self.step % every == 0 or evaluate:
                    record = self._record(output, batch)
                    seconds = time.perf_counter() - clock
                    record["images_per_second"] = steps * self.recipe.batch.size / seconds
                    record["data_wait"] = waited / seconds
                    self.log.write(record | (self.evaluate() if evaluate else {}))
                    clock, waited, steps = time.perf_counter(), 0.0, 0
                if self._due(self.recipe.checkpoint.every, self.stop):
                    self.save()
        finally:
            data.close()
            self.log.close()

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
            report=self.console.print,
        )

    def _due(self, every: int, last: int) -> bool:
        return self.step == last or self.step % every == 0 if every else False

    def _record(self, output: StepOutput, batch: Batch) -> dict[str, Any]:
        loss = output.loss.item()
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {self.step}: training has diverged; the last checkpoint "
                "is kept: resume with a lower --schedule.base-lr as a new run"
            )
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self.step // self.order.steps_per_epoch,
            "loss": loss,
            "lr": output.lr,
            "tau": output.tau,
            "feature_std": feature_std(output.features).item(),
            "data_digest": data_digest(batch.ids, batch.crcs),
        }
        if self.classes:
            record["head_loss"] = output.head_loss.item()
        return record

    # Evaluation -----------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """kNN and the online head on data.val, and the rank of its features."""
        assert self.val_index is not None  # the recipe's check
        bank = self.features(self.train_index, limit=self.recipe.probe.bank)
        queries = self.features(self.val_index)
        found = {"knn_top1": self._knn(bank, queries)}
        if self.online.classifier is not None:
            with torch.no_grad():
                logits = self.online.classifier(queries.features.to(self._dtype))
            found["online_top1"] = top1(logits, queries.labels)
        found["feature_rank"] = effective_rank(queries.features[:10_000]).item()
        return found

    def features(self, index: Index, limit: int | None = None, pixels: bool = False) -> Features:
        """Features of a data set's labelled images, from the encoder in evaluation mode.

        `pixels`: the images themselves instead.
        """

        def encode(images: Tensor) -> Tensor:
            images = normalize(images.to(self._dtype) / 255)
            if pixels:
                return images.flatten(1)
            with autocast(self.recipe.precision, self.device):
                features: Tensor = self.online.encoder(images)
            return features

        crops = center_crops(
            index,
            size=self.recipe.views.size,
            fraction=self.recipe.probe.crop,
            threads=self.recipe.threads,
            report=self.console.print,
            limit=limit,
        )
        self.online.eval()
        try:
            return extract(encode, crops, self.device)
        finally:
            self.online.train()

    def _knn(self, bank: Features, queries: Features) -> float:
        return knn_top1(
            bank,
            queries,
            neighbours=self.recipe.probe.neighbours,
            temperature=self.recipe.probe.temperature,
            classes=self.classes,
        )

    def _measure_baseline(self) -> None:
        assert self.val_index is not None  # the recipe's check
        self.baseline = {
            name: self._knn(
                self.features(self.train_index, self.recipe.probe.bank, pixels),
                self.features(self.val_index, None, pixels),
            )
            for name, pixels in (("raw pixels", True), ("untrained encoder", False))
        }
        for name, accuracy in self.baseline.items():
            self.console.print(f"kNN of {name}: {accuracy:.1%}")

    def _show_views(self, output: StepOutput) -> None:
        images = output.images.unflatten(0, (2, -1))[:, : self.recipe.log.pictures]
        self.log.pictures(images, self.step)

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

    def _restore(self) -> int:
        """Load this run's newest checkpoint, or the one to start from; return its step."""
        commit = checkpoint.latest(self.recipe.run, self.console.print)
        if commit is None and self.recipe.checkpoint.resume:
            commit = checkpoint.find(self.recipe.checkpoint.resume, self.console.print)
        if commit is None:
            return 0
        self._refuse(commit.url, commit.method, commit.index_digest)
        self.load(commit)
        self.console.print(f"resumed at step {commit.step} from {storage.redact(commit.url)}")
        return commit.step

    def _check_run(self) -> None:
        try:
            there = json.loads(storage.read(storage.join(self.recipe.run, RECIPE)))
        except FileNotFoundError:
            return
        except ValueError:
            self.console.print(f"{RECIPE} of the run is damaged; it is written anew")
            return
        method = method_fields(self.recipe)
        known = {name: value for name, value in there.items() if name in method}
        self._refuse(f"run {storage.redact(self.recipe.run)}", known, there.get("index_digest"))

    def _refuse(self, place: str, method: dict[str, Any], digest: str | None) -> None:
        found = differences(method, method_fields(self.recipe))
        if digest != self.train_index.digest:
            found.append(f"data.train's digest: there {digest}, here {self.train_index.digest}")
        if found:
            raise InputError(
                f"{place} belongs to another recipe or data set ({'; '.join(found)}): "
                "give these fields as they were, or another --run"
            )

    def _write_recipe(self) -> None:
        document = flatten(self.recipe) | {"index_digest": self.train_index.digest}
        text = json.dumps(document, indent=1)
        storage.write(storage.join(self.recipe.run, RECIPE), text.encode())

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
        if self.recipe.probe.every and not (train and val):
            name = "data.val" if train else "data.train"
            raise InputError(
                f"probe.every is set but {name} has no labels: use --probe.every 0, or pack the "
                "images in one folder for each class"
            )
        if train and val and train != val:
            raise InputError(
                f"data.val has other classes than data.train ({len(val)} and {len(train)}): "
                "pack both with the same class folders"
            )

    @property
    def _dtype(self) -> torch.dtype:
        return parameter_dtype(self.recipe.precision)


def _head_loss(logits: Tensor | None, labels: Tensor) -> Tensor:
    """Cross-entropy [] of the online classifier, over the rows that have a label (not -1)."""
    if logits is None:
        return torch.zeros((), device=labels.device)
    known = (labels >= 0).sum().clamp(min=1)
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / known
