"""Log a run to metrics.jsonl, to tensorboard and to the terminal."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torchvision.utils import make_grid

from engine.log.events import TENSORBOARD, EventLog
from engine.log.journal import JSONL, Journal, Record
from engine.log.terminal import Terminal
from engine.method.augment import MEAN, STD
from shards.errors import printable
from shards.fields import Operation
from shards.storage import files


@dataclass(frozen=True)
class LogConfig:
    """Configure what is logged, and how often."""

    every: Operation[Annotated[int, Interval(ge=1)]] = 10
    """Steps from one logged step to the next."""
    pictures: Operation[Annotated[int, Interval(ge=1, le=1024)]] = 8
    """Number of images whose two views are shown in tensorboard, at the start and at
    evaluations."""

    def due(self, step: int) -> bool:
        """Return whether `step` is logged."""
        return step % self.every == 0


class Timer:
    """Measure the speed of the steps since the timer was made.

    A new timer is made after each logged step and each checkpoint. So the time of evaluations and
    checkpoints does not count.
    """

    def __init__(self) -> None:
        self.steps, self._start, self._waited = 0, time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def read(self, batch: int) -> dict[str, float]:
        """Return the images per second, and the share (0 to 1) of the time spent waiting for data.

        `batch` is the number of images in each step.
        """
        seconds = time.perf_counter() - self._start
        return {
            "images_per_second": self.steps * batch / seconds,
            "data_wait": self._waited / seconds,
        }


class MetricsLog:
    """Write RUN/metrics.jsonl and RUN/tensorboard, and move the progress bar.

    The log is opened at step `start`. Later steps that an earlier process logged are dropped,
    because training makes those steps again. On an object store new lines and events wait in
    memory, and a thread writes them now and then. When storage fails, training continues. The log
    is kept in memory and written later.
    """

    def __init__(
        self,
        run: str,
        start: int,
        stop: int,
        terminal: Terminal,
    ) -> None:
        """Open the log, and drop later steps that an earlier process left. Raises OSError.

        The progress bar ends at step `stop`.
        """
        self.console = terminal.console
        self._run = run
        self._journal = Journal(run, start, terminal.report)
        self._events = EventLog(files.join(run, TENSORBOARD), start)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        self._storing: Future[None] | None = None
        self._failing = False
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task("train", total=stop, completed=start, status="")
        if self.console.is_terminal:
            self._progress.start()
        for record in self._journal.after(self._events.reached):
            self._plot(record, {})  # an earlier process ended before it wrote these points

    @property
    def last(self) -> Record | None:
        """Return the newest record, which an earlier process may have logged."""
        return self._journal.last

    def advance(self) -> None:
        self._progress.advance(self._task)

    def write(self, record: Record) -> None:
        """Log a step to metrics.jsonl, to tensorboard and to the terminal.

        The step that was logged last may be logged again with more keys.
        """
        last = self._journal.last
        self._plot(record, last if last and last["step"] == record["step"] else {})
        self._journal.write(record)
        self._store()
        self._show(record)

    def pictures(self, views: Tensor, step: int) -> None:
        """Log both views [2, n, 3, S, S] as one picture, with one row for each view.

        They are normalized, as the network sees them.
        """
        mean, std = (views.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        images = (views * std + mean).clamp(0, 1).flatten(0, 1).float().cpu()
        grid = make_grid(images, nrow=views.shape[1]).mul(255).round().byte()
        self._events.picture("views", grid.permute(1, 2, 0).numpy(), step)
        self._store()

    def flush(self) -> None:
        """Write to storage what a resumed run would not log again.

        Call it before a checkpoint is committed. Tensorboard's scalars need not be written, because
        the next process restores them from metrics.jsonl.
        """
        events = [self._events.flush] if self._events.unrepeatable else []
        self._attempt(self._journal.flush, *events)

    def compact(self) -> None:
        """Write all lines to metrics.jsonl. Call it after a checkpoint is saved."""
        self._attempt(self._journal.compact)

    def postpone(self, reason: str) -> None:
        """Report that storage fails, unless the last attempt failed too. The log is kept."""
        if not self._failing:
            text = f"{reason}; training goes on, the log is kept and written later"
            self.console.print(printable(text))
        self._failing = True

    def stop(self) -> None:
        """End the progress bar and the thread."""
        if self._progress.live.is_started:
            self._progress.stop()
        self._thread.shutdown()

    def finish(self) -> None:
        """Write the rest of the log, after `stop`, and report what could not be written."""
        if reason := _failure(self._journal.compact, self._events.flush):
            self.give_up(reason)

    def give_up(self, reason: str) -> None:
        """Report how much of the log will not be written, and the `reason`."""
        lines, events = self._journal.unwritten, self._events.unwritten
        reason = printable(reason)
        self.console.print(
            f"{reason}; not written are {lines} lines of {JSONL}, {events} events of {TENSORBOARD}"
        )

    def _plot(self, record: Record, known: Record) -> None:
        points = {k: v for k, v in record.items() if isinstance(v, float) and k not in known}
        self._events.scalars(points, record["step"])

    def _store(self) -> None:
        """Write to a local disk now. For an object store, let the thread write what is due.

        While the thread is still writing, nothing new is given to it.
        """
        if files.is_local(self._run):
            self._attempt(self._journal.flush, self._events.flush)
            return
        if self._storing is not None:
            if not self._storing.done():
                return
            self._storing.result()
        due = [log.flush for log in (self._journal, self._events) if log.due]
        self._storing = self._thread.submit(self._attempt, *due) if due else None

    def _attempt(self, *calls: Callable[[], None]) -> None:
        """Make calls that write to storage. Report the first failure of several in a row."""
        if reason := _failure(*calls):
            self.postpone(reason)
        else:
            self._failing = False

    def _show(self, record: Record) -> None:
        parent = record.get("branched_from")  # on the first line of a branch
        status = f"branched from {parent}" if parent else ""
        if "loss" in record:  # a step that is only evaluated has none
            loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
            status = f"loss {loss}  {record.get('images_per_second') or 0:,.0f} images/s"
        if "knn_top1" in record:
            status += f"  kNN {record['knn_top1']:.1%}"
        if "online_top1" in record:
            status += f"  online head {record['online_top1']:.1%}"
        self._progress.update(self._task, status=status)
        remaining = self._progress.tasks[0].time_remaining
        left = (
            "" if remaining is None else f"  {int(remaining) // 60}m{int(remaining) % 60:02}s left"
        )
        if not self.console.is_terminal or "knn_top1" in record:
            self.console.print(f"step {record['step']}  {status}{left}")


def _failure(*calls: Callable[[], None]) -> str:
    """Make calls until one raises OSError. Return its text, or "" when all succeed."""
    try:
        for call in calls:
            call()
    except OSError as error:
        return str(error)
    return ""


class NoLog(MetricsLog):
    """The log of all processes except the first. It writes nothing."""

    def __init__(self) -> None:
        pass

    @property
    def last(self) -> None:
        return None

    def advance(self) -> None:
        pass

    def write(self, record: Record) -> None:
        pass

    def pictures(self, views: Tensor, step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def compact(self) -> None:
        pass

    def postpone(self, reason: str) -> None:
        pass
