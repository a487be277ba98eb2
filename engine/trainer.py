"""Build the parts of a training run in order, and take one training step; fit.py has the loop."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_leaves

from engine.beginning import begin
from engine.data import Data, open_own_probe_sets, train_batches
from engine.evaluation.during_training import Probe
from engine.evaluation.probe_sets import ProbeSets
from engine.method import byol, schedule
from engine.method.augment import augment
from engine.method.average import PART, Average
from engine.method.byol import byol_loss, update_target
from engine.method.head import count_labels, head_loss, set_apart, set_rates
from engine.method.local_shards import local
from engine.method.norm import RunningStatistics
from engine.method.precision import StepGuard, autocast, parameter_dtype
from engine.processes import compiling, parallel
from engine.processes.copies import Copies
from engine.processes.step_graph import StepGraph, find_obstacle
from engine.processes.world import World, set_timeout, share_of_cores
from engine.recipe import Recipe, in_steps
from engine.run import Run
from engine.state import checkpoint
from engine.state.branch import without
from shards.center_crops import CropReader
from shards.loader import Batch
from shards.loader_process import Loader

Rate = float | Tensor  # [] float32 on the device, in a CUDA graph


class StepOutput(NamedTuple):
    """Hold what a step leaves for the log, on the device.

    The images, features and projections are those of the last micro-batch only. With a CUDA graph
    the next step overwrites all of them.
    """

    loss: Tensor  # [] this process's share of the mean over the global batch, 0 to 8
    head_loss: Tensor  # [] its share of the mean over the labeled rows, for the online head
    labeled: Tensor  # [] the number of labeled rows in the global batch
    features: Tensor  # [V*b, F]
    projections: Tensor  # [V*b, D], the target network's
    images: Tensor  # [V*b, 3, S, S], as the network saw them
    lr: float
    tau: float


Updated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the tensors of StepOutput


class Trainer:
    """Hold one process's networks and optimizer; `step` counts the updates that are done."""

    def __init__(self, recipe: Recipe, world: World, data: Data, run: Run) -> None:
        """Build the networks, the strategy and the optimizer, then load the saved state.

        All processes call it together. It reads from storage and writes nothing there, except
        that a folder of images for evaluations is packed into RUN.

        Raises InputError for a strategy that these processes cannot use, and for sets that
        nothing can be measured on.
        """
        self.recipe = recipe = in_steps(recipe, data.order.steps_per_epoch)
        self.world, self.data, self.run = world, data, run
        self.device, self.terminal = world.device, run.terminal
        self.copies = Copies(world.device)
        self.threads = recipe.threads or share_of_cores()
        samples, batch = data.train.samples, recipe.batch.size
        self.total_steps = recipe.schedule.total_steps(samples, batch)
        self.warmup_steps = recipe.schedule.warmup_steps(samples, batch)
        self.peak_lr = recipe.schedule.peak_lr(batch)
        self.tau_power = recipe.schedule.tau_power(batch)

        self.classes = len(data.train.classes)
        beginning = begin(recipe, world, run, data.train)
        run.origin, self.ramp = beginning.origin, beginning.ramp
        probe_sets = open_own_probe_sets(recipe, data, world, self.threads, self.terminal.say)
        size = recipe.views.size
        self.online, self.target = byol.build(recipe.model, self.classes, recipe.seed, size)
        if beginning.weights is not None:
            beginning.weights.fill(self.online, self.target)
        self._parallelize()
        self.optimizer = recipe.optimizer.build(self.online, self.parallel.shard_group)
        self.peak_head_lr = self.peak_lr
        if recipe.probe.head_lr is not None and self.online.classifier is not None:
            self.peak_head_lr = recipe.schedule.peak_lr(batch, recipe.probe.head_lr)
            set_apart(self.optimizer, self.online.classifier)
        pairs = byol.pair_parameters(self.target, self.online)
        self.target_parameters, self.online_parameters = pairs
        self.statistics = RunningStatistics([self.online, self.target])
        self.average = Average(recipe.average, self.online.encoder, self.update_target)
        self.guard = StepGuard(recipe.precision, self.device, batch, world.size)

        self.probe = self._build_probe(probe_sets)
        self.graph = self._make_graph()
        self.step = beginning.step
        if beginning.commit is not None:
            self.load(beginning.commit, beginning.left_out)
        if beginning.text:
            self.terminal.say(beginning.text)

    def _parallelize(self) -> None:
        recipe, say = self.recipe, self.terminal.say
        slots, averages = recipe.optimizer.slots, recipe.average.rate > 0
        held = parallel.state_bytes(self.online, self.target, slots, averages)
        strategy = parallel.choose(recipe.parallel, self.world, held, say)
        missing = compiling.find_missing_compiler(self.device) if recipe.compile else ""
        if missing:
            say(f"compile: {missing}; going on without torch.compile")
        self.compile = recipe.compile and not missing
        compiling.check_norm(self.world, self.compile)
        self.artefacts = self.run.artefacts(strategy)
        if self.compile and recipe.compile_artefacts:
            self.artefacts.load(say)
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
        self.byol_loss, self.head_loss, self.update_target = byol_loss, head_loss, update_target
        if self.compile:
            self.byol_loss = compiling.compiled(byol_loss)
            self.head_loss = compiling.compiled(head_loss)
            self.update_target = compiling.compiled(update_target)
            if self.device.type == "cuda":  # on a CPU, augment splits the rows itself
                self.augment = compiling.compiled(self.augment)

    # The step -------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> StepOutput:
        """Take one step. It counts even when a gradient is not finite."""
        lr, head_lr, tau = self._rates()
        views, params, labels = self.copies.take(batch.views, batch.params, batch.labels)
        rates = lr, head_lr, 1 - tau
        if self.graph is None:
            found = self.update(views, params, labels, *rates)
        else:
            found = self.graph((views, params, labels), rates)
        self.step += 1  # a skipped step takes its place in the schedule too
        return StepOutput(*found, lr, tau)

    def update(
        self, views: Tensor, params: Tensor, labels: Tensor, lr: Rate, head_lr: Rate, pace: Rate
    ) -> Updated:
        """Train the online network on both views, then move the target by `pace`, 1 - tau.

        Nothing here waits for the device, and with the optimizers of this project nothing depends
        on the host, so a CUDA graph may repeat it. With micro-batches, the gradients are averaged
        over them, and everything after the backward passes happens once, as in the paper. A step
        with a gradient that is not finite changes only what the guard keeps.

        Source: section 3.1 and algorithm 1 of the paper.

        Args:
            views: [V, B, 3, S, S] of this process's rows, on the device.
            params: [V, B, P], their parameters of the augmentation.
            labels: [B] int64, -1 where there is none.
            lr: The learning rate of the networks.
            head_lr: That of the online head.
            pace: 1 - tau.

        Returns:
            The tensors of StepOutput.
        """
        parts = self._micro_batches(views, params, labels)
        share = len(labels) / self.recipe.batch.size / len(parts)  # of the global batch
        labeled = self._count_labels(labels)
        loss = head_total = torch.zeros((), device=self.device)

        for number, (some_views, some_params, some_labels) in enumerate(parts, start=1):
            images = self.augment(some_views, some_params)  # [V*b, 3, S, S]
            with self.parallel.micro_batch(last=number == len(parts)):
                with autocast(self.recipe.precision, self.device):
                    with torch.no_grad():  # first, while no activations are kept
                        projection = self.target(images)  # [V*b, D]
                    output = self.parallel.online(images)
                byol_term = self.byol_loss(output.prediction, projection).mean() * share
                head_term = self.head_loss(output.logits, some_labels, labeled)
                self.guard.scale_loss(byol_term + head_term).backward()
            self.statistics.note()
            loss = loss + byol_term.detach()
            head_total = head_total + head_term.detach()

        set_rates(self.optimizer, lr, head_lr)
        divisor = self.guard.divisor(self.online.parameters())
        skip = self.optimizer.step(divisor, self.recipe.clip)  # [] 1 when gradients are not finite
        self.optimizer.zero_grad()
        fraction = pace * (1 - skip).to(parameter_dtype(self.recipe.precision))
        self.update_target(local(self.target_parameters), local(self.online_parameters), fraction)
        self.statistics.apply(skip)
        self.average.follow(skip)
        self.guard.update(skip)
        return loss, head_total, labeled, output.features, projection, images

    def _rates(self) -> tuple[float, float, float]:
        """Return the learning rates of the networks and of the online head, and tau."""
        options, total = self.recipe.schedule, self.total_steps
        lr, head_lr = (
            schedule.learning_rate(
                self.step, peak, self.warmup_steps, total, self.ramp, options.lr_decay
            )
            for peak in (self.peak_lr, self.peak_head_lr)
        )
        return lr, head_lr, schedule.tau(self.step, options.base_tau, total, self.tau_power)

    def _count_labels(self, labels: Tensor) -> Tensor:
        """Count the labeled rows of the global batch, [] on the device; 0 without a head.

        Every process needs that number before its backward pass, and an index does not tell which
        samples have labels. So the processes add up their own counts on the device, beside dozens
        of such sums in the batch norms, and no host waits.
        """
        if not self.classes:
            return torch.zeros((), device=self.device)
        return self.world.all_reduce(count_labels(labels))

    def _micro_batches(
        self, views: Tensor, params: Tensor, labels: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Split a batch into micro-batches.

        Returns:
            The views [V*b, 3, S, S], augmentation parameters [V*b, P] and labels [b] of each.
        """
        if self.recipe.precision == "fp64":
            views, params = views.double() / 255, params.double()
        micro = self.recipe.batch.micro
        parts = zip(
            views.chunk(micro, dim=1), params.chunk(micro, dim=1), labels.chunk(micro), strict=True
        )
        return [(v.flatten(0, 1), p.flatten(0, 1), label) for v, p, label in parts]

    def _make_graph(self) -> StepGraph[Updated] | None:
        """Return what repeats steps as a CUDA graph, or None where none is wanted or possible."""
        if not self.recipe.cuda_graph:
            return None
        if obstacle := find_obstacle(self.world, self.recipe.optimizer):
            self.terminal.say(f"cuda_graph: {obstacle}; going on without a CUDA graph")
            return None
        return StepGraph(self.update, self._changed)

    def _changed(self) -> list[Tensor]:
        """List all tensors that a step changes."""
        found: list[Any] = [self.guard.state(), self.average.state()]
        found += list(self.optimizer.state.values())
        for network in (self.online, self.target):
            found += [*network.parameters(), *network.buffers()]
        return [leaf.detach() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]

    # The parts ------------------------------------------------------------------------------

    def batches(self) -> Loader:
        """Load this process's rows of every batch, from the next step on."""
        return train_batches(
            self.recipe,
            self.data.order,
            self.world,
            start=self.step,
            threads=self.threads,
            report=self.terminal.report,
        )

    def _build_probe(self, sets: ProbeSets | None) -> Probe | None:
        recipe = self.recipe
        if sets is None:
            return None
        crops = CropReader(
            recipe.views.size,
            recipe.probe.crop,
            self.threads,
            recipe.data.corrupt,
            self.terminal.report,
            (self.world.rank, self.world.size),
            recipe.data.rules,
        )
        encoder = recipe.model.encoder
        return Probe(recipe.probe, self.online, encoder, sets, self.world, crops, recipe.precision)

    @property
    def last_step(self) -> int:
        """Return the step that this process stops after: `steps`, or the run's end if sooner."""
        steps = self.recipe.steps
        return self.total_steps if steps is None else min(steps, self.total_steps)

    def finish_start(self, taken: int) -> None:
        """Shorten the timeout after the first step, and save compiled artefacts after the second.

        `taken` is the number of steps since this process started.
        """
        if taken == 1:  # every process that compiles has done so by now
            set_timeout(self.recipe.parallel.timeout, self.parallel.groups)
        if taken == 2 and self.compile and self.recipe.compile_artefacts:
            self.artefacts.save(self.terminal.say)

    def skipped(self) -> bool:
        """Return whether the last step was skipped; the host waits for it.

        Such a step is not saved, so that a row of them does not displace the checkpoints before it.
        """
        return self.guard.in_a_row > 0

    # Saved state ----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the run's tensors: with the recipe and the step, all that a checkpoint needs."""
        optimizer = get_optimizer_state_dict(self.online, self.optimizer)
        return {
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": optimizer["state"],
            "guard": self.guard.state(),
        } | self.average.state()

    def load(self, commit: checkpoint.Commit, left_out: tuple[str, ...] = ()) -> None:
        """Load a checkpoint's tensors, except the parts of the state that are left out."""
        state = self.state()
        checkpoint.load(commit, without(state, left_out), self.world)
        self.online.load_state_dict(state["online"])
        self.target.load_state_dict(state["target"])
        if PART in left_out:
            self.average.restart()
        groups = get_optimizer_state_dict(self.online, self.optimizer)["param_groups"]
        set_optimizer_state_dict(
            self.online,
            self.optimizer,
            optim_state_dict={"state": state["optimizer"], "param_groups": groups},
        )
