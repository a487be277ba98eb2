"""Take the training steps of a process, and measure those that are logged."""

import resource
import socket
import sys
import time
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from engine.log.figures import StepSums, data_digest
from engine.log.journal import Record
from engine.log.profiling import StepProfiler, parse_steps
from engine.log.ranks import RankTimes
from engine.log.timer import Timer
from engine.method.byol import VIEWS
from engine.method.durations import parse
from engine.method.flops import count_flops, find_peak
from engine.method.update_norms import UpdateNorms
from engine.trainer import StepOutput, Trainer
from shards.loader import Batch


class Meter:
    """Measure the steps of one process. What costs time is measured at logged steps only."""

    def __init__(self, trainer: Trainer) -> None:
        """Prepare what is measured. All processes call it together."""
        self._trainer, recipe = trainer, trainer.recipe
        self._norms = UpdateNorms(trainer.optimizer, trainer.online, trainer.parallel.shard_group)
        self._ranks = RankTimes(trainer.world.all_gather_object(socket.gethostname()))
        self._peak = find_device_peak(trainer)
        self._flops = 0.0  # of a step, for each image
        self._preparing = _Preparing(trainer)
        steps = parse_steps(recipe.profile if trainer.world.main else "")
        self._profiler = StepProfiler(steps, recipe.run, trainer.device, trainer.terminal)
        self._profiler.check(trainer.step + 1, trainer.last_step)
        self._timer = Timer()

    def __enter__(self) -> "Meter":
        self._preparing.watch()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write and show what has been gathered, unless training has failed."""
        self._preparing.leave()
        if kind is not None:
            self._profiler.cancel()
            return
        self._profiler.write(self._trainer.step)
        self.show_ranks()

    def logs(self, step: int) -> bool:
        """Return whether `step` is logged. The last one of this process always is."""
        return step == self._trainer.last_step or self.is_regular(step)

    def is_regular(self, step: int) -> bool:
        """Return whether `step` is logged in any case, wherever a process ends.

        The first step of the run always is, and those of evaluations.
        """
        recipe, total = self._trainer.recipe, self._trainer.total_steps
        return step == 1 or recipe.log.due(step) or recipe.probe.due(step, total)

    def waiting(self) -> AbstractContextManager[None]:
        """Count the time of the block as waiting for data."""
        return self._timer.waiting()

    def take_step(self, batch: Batch) -> StepOutput:
        """Train on a batch."""
        trainer = self._trainer
        self._profiler.begin(trainer.step + 1)
        self._preparing.begin()
        logged = self.logs(trainer.step + 1)
        if trainer.graph is not None:
            trainer.graph.active = not logged  # the hooks of what is measured see ordinary steps
        with self._norms.measuring(logged):
            output = trainer.train_step(batch)
        self._timer.steps += 1
        self._profiler.end(trainer.step)
        return output

    def read(self, output: StepOutput, batch: Batch) -> Record:
        """Return the record of the last step. All processes call it together."""
        trainer = self._trainer
        record = describe_step(trainer, output, batch) | self._norms.read() | self._read_speeds()
        if self._ranks.steps >= parse(trainer.recipe.log.ranks_every)[0]:
            self.show_ranks()
        return record

    def pictures(self, output: StepOutput) -> Tensor:
        """Return both views [V, n, 3, S, S] of the first images, as the network saw them."""
        both: Tensor = output.images.unflatten(0, (VIEWS, -1))
        return both[:, : self._trainer.recipe.log.pictures]

    def _read_speeds(self) -> Record:
        trainer, timer = self._trainer, self._timer
        world, recipe = trainer.world, trainer.recipe
        speeds: Record = dict(timer.read(recipe.batch.size))
        speed = speeds["images_per_second"] / world.size
        speeds["images_per_second_device"] = speed
        alone = timer.waited + self._preparing.read(timer.steps)
        rows = torch.zeros(world.size, 4, dtype=torch.float64)
        graph = 0 if trainer.graph is None else trainer.graph.memory
        memory = peak_memory(trainer.device) + graph / 2**30
        own = [timer.seconds, timer.waited, alone, memory]
        rows[world.rank] = rows.new_tensor(own)
        found = world.all_reduce(rows).numpy()
        self._ranks.add(found[:, :3], timer.steps)
        speeds["memory_gib"] = float(found[:, 3].max())
        if self._peak is not None:
            speeds["mfu"] = self._count_flops() * speed / self._peak
        return speeds

    def _count_flops(self) -> float:
        if not self._flops:
            recipe = self._trainer.recipe
            self._flops = count_flops(recipe.model, self._trainer.classes, recipe.views.size)
        return self._flops

    def show_ranks(self) -> None:
        """Print a table of the slowest processes since the last such table, on the first one."""
        table = self._ranks.table()
        if table and self._trainer.recipe.log.ranks_every:
            self._trainer.terminal.console.print(table)

    def restart(self) -> None:
        """Start the clock anew, so that the time of evaluations and checkpoints does not count."""
        self._timer = Timer()
        self._preparing.restart()


class _Preparing:
    """Measure how long a process takes for its images before it meets the others in a step.

    On a GPU that is known of the last step only, without waiting for it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._augment = trainer, trainer.augment
        self._cuda = trainer.device.type == "cuda"
        if self._cuda:
            self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._open, self._start = False, 0.0
        self.restart()

    def restart(self) -> None:
        self._seconds = 0.0

    def watch(self) -> None:
        """Look on whenever the trainer augments images."""
        self._trainer.augment = self._augment_timed

    def leave(self) -> None:
        """Give the trainer back what it had."""
        self._trainer.augment = self._augment

    def begin(self) -> None:
        """Note that a step begins."""
        self._open, self._start = True, time.perf_counter()
        if self._cuda:
            self._marks[0].record()

    def read(self, steps: int) -> float:
        """Return the seconds of `steps` steps. The last step must be over."""
        if self._cuda:
            return steps * float(self._marks[0].elapsed_time(self._marks[1])) / 1000
        return self._seconds

    def _augment_timed(self, views: Tensor, params: Tensor) -> Tensor:
        images: Tensor = self._augment(views, params)
        if self._open:  # of several micro-batches, the first
            self._open = False
            self._seconds += time.perf_counter() - self._start
            if self._cuda:
                self._marks[1].record()
        return images


def describe_step(trainer: Trainer, output: StepOutput, batch: Batch) -> Record:
    """Return a step's log record without its speed; it is the same on every process.

    All processes call it together.
    """
    losses = output.loss, output.head_loss
    own = StepSums.of(*losses, output.features, output.projections, output.images)
    sums = StepSums(trainer.world.all_reduce(own.values), output.features.shape[1])
    digest = trainer.world.all_reduce(data_digest(batch.ids, batch.crcs)).item()
    record: Record = {
        "step": trainer.step,
        "epoch": trainer.step // trainer.data.order.steps_per_epoch,
        "loss": sums.loss,
        "lr": output.lr,
        "tau": output.tau,
        "feature_std": sums.feature_std,
        "projection_std": sums.projection_std,
        "view_std": sums.view_std,
        "view_correlation": sums.view_correlation,
        "data_digest": f"{digest % 2**64:016x}",
        "skipped": int(trainer.guard.skipped),
    }
    if trainer.guard.scale is not None:
        record["loss_scale"] = trainer.guard.scale.item()
    if trainer.classes:
        record["head_loss"] = sums.head_loss if output.labeled else None
    return record


def find_device_peak(trainer: Trainer) -> float | None:
    """Return the operations that this process's GPU can do in a second, or None.

    It is None on a CPU, and for a GPU that `find_peak` does not know.
    """
    if trainer.device.type != "cuda":
        return None
    name, tf32 = torch.cuda.get_device_name(trainer.device), torch.backends.cudnn.allow_tf32
    return find_peak(name, trainer.recipe.precision, tf32)


def peak_memory(device: torch.device) -> float:
    """Return the most memory that tensors had on a GPU, or that this process had on a CPU, in GiB.

    It is counted from the start of the process.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
