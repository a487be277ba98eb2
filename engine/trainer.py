"""The training: what is built, and in which order; the step. Around it is the loop of fit.py."""

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

from engine import run
from engine.data import open_data, train_batches
from engine.evaluation.probe import Probe
from engine.method import byol
from engine.method.augment import augment
from engine.method.byol import byol_loss, update_target
from engine.method.local_shards import local
from engine.method.norm import RunningStatistics
from engine.method.precision import StepGuard, autocast, parameter_dtype
from engine.method.schedule import learning_rate, tau
from engine.processes import compiling, parallel, world
from engine.processes.identity import agent_identity
from engine.recipe import Recipe
from engine.state import checkpoint, lease
from shards.loader import Batch, TrainLoader
from shards.storage import files


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
        self.console = Console(
            markup=False, highlight=False, soft_wrap=True, quiet=not self.world.main
        )
        # Every process tells of the faults that it sees in its data, each once.
        self.report = cache(Console(markup=False, highlight=False, soft_wrap=True).print)

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

        self.classes = len(self.train_index.classes)
        self.online, self.target = byol.build(recipe.model, self.classes, recipe.seed)
        held = parallel.state_bytes(self.online, self.target, recipe.optimizer.slots)
        strategy = parallel.choose(recipe.parallel, self.world, held, self.console.print)
        self.lease = self._claim_run()
        try:
            self._build(strategy)
        except BaseException:
            if self.lease is not None:
                self.lease.release()
            raise

    def _build(self, strategy: parallel.Strategy) -> None:
        """All that comes after the run's directory is this job's."""
        recipe = self.recipe
        commit = run.find_checkpoint(recipe, self.train_index.digest, self.world, self.report)
        if not recipe.debug_step:
            self.world.on_main(lambda: run.write(recipe, self.train_index.digest))
        self._parallelize(strategy)
        self.optimizer = recipe.optimizer.build(self.online, self.parallel.shard_group)
        self.moved, self.towards = byol.paired(self.target, self.online)
        self.statistics = RunningStatistics([self.online, self.target])
        self.guard = StepGuard(recipe.precision, self.device, recipe.batch.size, self.world.size)
        if self.compile:
            compiling.compile_optimizer(self.optimizer)

        self.probe = self._build_probe()
        self.step = 0
        if commit is None:
            self.baseline = self._measure_baseline()
        else:
            self.load(commit)
            self.step, self.baseline = commit.step, {}
            self.console.print(f"resumed at step {self.step} from {files.redact(commit.url)}")

    def _claim_run(self) -> lease.Lease | None:
        """Make sure that the run's directory is of this recipe, and no other job's; None on all
        processes but the first, and when nothing is going to be written."""
        claimed: list[lease.Lease] = []
        agents = self.world.all_gather_object(agent_identity())

        def claim() -> None:
            run.check(self.recipe, self.train_index.digest, self.report)
            if not self.recipe.debug_step:
                held = lease.acquire(self.recipe.run, agents, lease.PERIOD, self.report)
                claimed.append(held)

        self.world.on_main(claim)
        return claimed[0] if claimed else None

    def _parallelize(self, strategy: parallel.Strategy) -> None:
        recipe = self.recipe
        missing = compiling.missing_compiler(self.device) if recipe.compile else ""
        if missing:
            self.console.print(f"compile: {missing}; going on without torch.compile")
        self.compile = recipe.compile and not missing
        self.artefacts = run.open_artefacts(recipe, self.world, strategy)
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
                self.guard.scaled(byol_term + head_term).backward()
            self.statistics.note()
            loss = loss + byol_term.detach()
            head_loss = head_loss + head_term.detach()

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        divisor = self.guard.divisor(self.online.parameters())
        skip = self.optimizer.step(divisor)  # [] 1 where a gradient is not finite
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

    # The parts ------------------------------------------------------------------------------

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

    def is_measured(self, step: int) -> bool:
        """Whether an evaluation belongs to `step`."""
        every = self.recipe.probe.every
        return every > 0 and (step == self.total_steps or step % every == 0)

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


def _head_loss(logits: Tensor | None, labels: Tensor) -> Tensor:
    """Cross-entropy [] of the online classifier, mean over the rows; those without a label (-1)
    count as 0, so that nobody needs to know how many there are elsewhere."""
    if logits is None:
        return torch.zeros((), device=labels.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / len(labels)
