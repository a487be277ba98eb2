"""The training: what is built, and in which order; the step; the loop around it."""

from collections.abc import Callable
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

from engine import byol, checkpoint, compiling, parallel, run, world
from engine.artefacts import Artefacts
from engine.augment import augment
from engine.byol import byol_loss, update_target
from engine.data import open_data, train_batches
from engine.metrics import MetricsLog, NoLog, StepSums, Timer, data_digest
from engine.norm import RunningStatistics
from engine.precision import PATIENCE, StepGuard, autocast, parameter_dtype
from engine.probe import Probe
from engine.recipe import Recipe, method_fields
from engine.schedule import learning_rate, tau
from engine.sharding import foreach_norms, local, not_finite, whole_norms
from shards import storage
from shards.errors import InputError
from shards.loader import Batch, TrainLoader


class StepOutput(NamedTuple):
    """What a step leaves for the log, on the device; images, features: the last micro-batch's."""

    loss: Tensor  # [] this process's share of the mean over the global batch, 0 to 8
    head_loss: Tensor  # [] of the online classifier, likewise; 0 without labels
    features: Tensor  # [V*b, F]
    images: Tensor  # [V*b, 3, S, S], as the network saw them
    lr: float
    tau: float


class Trainer:
    """A run, in this process: data, networks and optimizer, with `step` updates done."""

    def __init__(self, recipe: Recipe) -> None:
        """Build, in this order: processes, data, networks, saved state, strategy, optimizer.

        Raises InputError for what the user got wrong, before the first expensive thing.
        """
        self.recipe = recipe
        self.world = world.enter(recipe.threads, recipe.parallel.strategy != "auto")
        self.device = self.world.device
        self.threads = recipe.threads or world.share_of_cores()
        self.console = Console(highlight=False, soft_wrap=True, quiet=not self.world.main)
        # Every process tells of the faults that it sees in its data, each once.
        self.report = cache(Console(highlight=False, soft_wrap=True).print)

        run.check_alike(self.world, run.shared_fields(recipe))
        self.train_index, self.val_index, self.order = open_data(
            recipe, self.world, self.console.print
        )
        run.check_alike(self.world, {"digest of data.train": self.train_index.digest})
        samples, batch = self.train_index.samples, recipe.batch.size
        self.total_steps = recipe.schedule.total_steps(samples, batch)
        self.warmup_steps = recipe.schedule.warmup_steps(samples, batch)
        self.peak_lr = recipe.schedule.peak_lr(batch)
        self.tau_power = recipe.schedule.tau_power(batch)
        self.stop = self.total_steps if recipe.steps is None else recipe.steps
        self.stop = min(self.stop, self.total_steps)

        self.classes = len(self.train_index.classes)
        self.online, self.target = byol.build(recipe.model, self.classes, recipe.seed)
        held = parallel.state_bytes(self.online, self.target, recipe.optimizer.slots)
        strategy = parallel.choose(recipe.parallel, self.world, held, self.console.print)
        commit = self.world.tell(self._open_run)
        self._parallelize(strategy)
        self.optimizer = recipe.optimizer.build(self.online, self.parallel.shard_group)
        self.moved, self.towards = byol.paired(self.target, self.online)
        self.statistics = RunningStatistics([self.online, self.target])
        self.guard = StepGuard(recipe.precision, self.device)
        if self.compile:
            compiling.compile_optimizer(self.optimizer)

        self.probe = self._build_probe()
        self.step = 0
        if commit is None:
            self.baseline = self._measure_baseline()
        else:
            self.load(commit)
            self.step, self.baseline = commit.step, {}
            self.console.print(f"resumed at step {self.step} from {storage.redact(commit.url)}")

    def _open_run(self) -> checkpoint.Commit | None:
        """Claim the run's directory for this recipe, and find what to go on from."""
        run.check(self.recipe, self.train_index.digest, self.report)
        commit = self._find_checkpoint()
        if not self.recipe.debug_step:
            run.write(self.recipe, self.train_index.digest)
        return commit

    def _parallelize(self, strategy: parallel.Strategy) -> None:
        recipe = self.recipe
        missing = compiling.missing_compiler(self.device) if recipe.compile else ""
        if missing:
            self.console.print(f"compile: {missing}; going on without torch.compile")
        self.compile = recipe.compile and not missing
        self.artefacts = Artefacts(recipe, self.world, strategy)
        if self.compile and recipe.compile_artefacts:
            self.artefacts.load(self.console.print)
        for network in (self.online, self.target):
            network.to(self.device, parameter_dtype(recipe.precision))
        self.parallel = parallel.parallelize(
            self.online,
            self.target,
            recipe.parallel,
            strategy,
            self.world,
            compile=self.compile,
            static=recipe.batch.micro == 1,
        )
        self.augment: Callable[..., Tensor] = partial(augment, blur=recipe.views.ever_blur)
        self.update_target = update_target
        if self.compile:
            self.update_target = compiling.compiled(update_target)
            if self.device.type == "cuda":  # a CPU takes rows in parts that its caches hold
                self.augment = compiling.compiled(self.augment)

    # The step -------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> StepOutput:
        """One update: both networks see both views, the online one learns, the target follows.

        Section 3.1 and algorithm 1 of the paper. With micro-batches, gradients are averaged over
        them and everything after the backward passes happens once, as in the paper. A step with a
        gradient that is not finite changes nothing but the guard's counters.
        """
        lr = learning_rate(self.step, self.peak_lr, self.warmup_steps, self.total_steps)
        rate = tau(self.step, self.recipe.schedule.base_tau, self.total_steps, self.tau_power)
        parts = self._micro_batches(batch)
        share = len(batch.ids) / self.recipe.batch.size / len(parts)  # of the global batch
        loss = head_loss = torch.zeros((), device=self.device)

        for number, (views, params, labels) in enumerate(parts, start=1):
            images = self.augment(views, params)  # [V*b, 3, S, S]
            with self.parallel.micro_batch(last=number == len(parts)):
                with autocast(self.recipe.precision, self.device):
                    online = self.parallel.online(images)
                    with torch.no_grad():
                        projection = self.target(images)  # [V*b, D]
                byol_term = byol_loss(online.prediction, projection).mean() * share
                head_term = _head_loss(online.logits, labels) * share
                # Gradients are averaged over the processes, shares of a batch add up.
                self.guard.scaled((byol_term + head_term) * self.world.size).backward()
            self.statistics.note()
            loss = loss + byol_term.detach()
            head_loss = head_loss + head_term.detach()

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        skip = self.optimizer.step(self.guard.scale)  # [] 1 where a gradient is not finite
        self.optimizer.zero_grad()
        follow = (1 - rate) * (1 - skip).to(parameter_dtype(self.recipe.precision))
        self.update_target(local(self.moved), local(self.towards), follow)
        self.statistics.apply(skip)
        self.guard.update(skip)
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
        log = (
            MetricsLog(recipe.run, self.step, self.stop, self.console)
            if self.world.main
            else NoLog()
        )
        data = self.batches()
        self.console.print(
            f"{self.train_index.samples:,} images, {self.order.steps_per_epoch:,} steps an epoch; "
            f"steps {self.step:,} to {self.stop:,} on {self.device}; blocks in memory: up to about "
            f"{data.block_memory / 2**20:,.0f} MiB"
        )
        timer = Timer()
        try:
            while self.step < self.stop:
                with timer.waiting():
                    batch = next(data)
                output = self.train_step(batch)
                self.step += 1
                timer.steps += 1
                log.advance()
                if self.guard.in_a_row() >= PATIENCE:
                    raise self._diverged(output)
                if self.step == first + 1:
                    world.set_timeout(recipe.parallel.timeout, self.parallel.groups)
                if self.step == first + 2 and self.compile and recipe.compile_artefacts:
                    self.artefacts.save(self.console.print)

                measure = recipe.probe.every > 0 and self._due(recipe.probe.every, self.total_steps)
                if measure or self.step == first + 1:
                    views = output.images.unflatten(0, (2, -1))[:, : recipe.log.pictures]
                    log.pictures(views, self.step)  # [V, n, 3, S, S]
                if measure or self.step % recipe.log.every == 0:
                    record = self._record(output, batch) | timer.read(recipe.batch.size)
                    if measure and self.probe is not None:
                        self._check_finite(output)
                        measured = self.probe.evaluate()
                        record |= measured
                    log.write(record)
                    timer = Timer()
                if self._due(recipe.checkpoint.every, self.stop):
                    self._check_finite(output)
                    self.save()
                    timer = Timer()
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
        """This process's rows of the batches, from the next step on."""
        return train_batches(
            self.recipe,
            self.order,
            self.world,
            start=self.step,
            threads=self.threads,
            report=self.report,
        )

    def _due(self, every: int, last: int) -> bool:
        return self.step == last or (every > 0 and self.step % every == 0)

    def _check_finite(self, output: StepOutput) -> None:
        """Before a step is measured or saved: a diverged run must not push out good states."""
        norms = foreach_norms(local(self.online.parameters()))
        if not_finite(whole_norms(norms, self.parallel.shard_group)):
            raise self._diverged(output)

    def _diverged(self, output: StepOutput) -> InputError:
        scale = "" if self.guard.scale is None else f", loss scale {self.guard.scale.item():g}"
        loss = self.world.sum(output.loss.double().cpu()).item()
        return InputError(
            f"training has diverged: gradients or weights are not finite at step {self.step} "
            f"(loss {loss:g}, learning rate {output.lr:g}{scale}); "
            "the last checkpoint is kept: start a new run with a lower --schedule.base-lr"
            + (" or --precision bf16" if self.recipe.precision == "fp16" else "")
        )

    def _record(self, output: StepOutput, batch: Batch) -> dict[str, Any]:
        own = StepSums.of(output.loss, output.head_loss, output.features)
        sums = StepSums(self.world.sum(own.values))
        digest = self.world.sum(data_digest(batch.ids, batch.crcs)).item()
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self.step // self.order.steps_per_epoch,
            "loss": sums.loss,
            "lr": output.lr,
            "tau": output.tau,
            "feature_std": sums.feature_std,
            "data_digest": f"{digest % 2**64:016x}",
            "skipped": int(self.guard.skipped),
        }
        if self.guard.scale is not None:
            record["loss_scale"] = self.guard.scale.item()
        if self.classes:
            record["head_loss"] = sums.head_loss
        return record

    def _build_probe(self) -> Probe | None:
        """None when the recipe asks for no evaluations."""
        recipe = self.recipe
        if self.val_index is None or not (recipe.probe.every or recipe.probe.baseline):
            return None
        return Probe(
            recipe.probe,
            self.online,
            recipe.model.encoder,
            self.train_index,
            self.val_index,
            self.world,
            size=recipe.views.size,
            precision=recipe.precision,
            threads=self.threads,
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
            "guard": self.guard.state(),
        }

    def save(self) -> checkpoint.Commit:
        """Commit the state as this step's checkpoint, then remove the oldest ones."""
        recipe = self.recipe
        commit = checkpoint.save(
            recipe.run,
            self.step,
            self.state(),
            method_fields(recipe),
            self.train_index.digest,
            self.world,
        )
        self.world.tell(lambda: checkpoint.prune(recipe.run, recipe.checkpoint.keep))
        return commit

    def load(self, commit: checkpoint.Commit) -> None:
        """Take over a checkpoint's tensors."""
        state = self.state()
        checkpoint.load(commit, state, self.world)
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


def _head_loss(logits: Tensor | None, labels: Tensor) -> Tensor:
    """Cross-entropy [] of the online classifier, mean over the rows; those without a label (-1)
    count as 0, so that nobody needs to know how many there are elsewhere."""
    if logits is None:
        return torch.zeros((), device=labels.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / len(labels)
