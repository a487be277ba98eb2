"""Log a run to metrics.jsonl, to tensorboard, to trackers and to the terminal."""

import sys
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from annotated_types import Interval
from torch import Tensor

from engine.log.curves import (
    VIEWS,
    compare_fields,
    lay_out_overview,
    name_curve,
    show_fields,
)
from engine.log.events import EventLog
from engine.log.health import Health
from engine.log.journal import JSONL, Journal, Record
from engine.log.pictures import draw_views
from engine.log.step_lines import StepLines
from engine.log.terminal import Terminal
from engine.log.tracker_ids import run_id
from engine.log.trackers import Description, Point
from engine.log.tracking import Tracking
from engine.log.visdom_tracker import VisdomURL
from engine.log.wandb_tracker import Project
from engine.log.watch import Watch
from engine.method.durations import Duration, Lasting, is_due, simplify
from shards.fields import Operation
from shards.storage import files, misplaced

# The keys of the record of step 0, which holds what an encoder has to beat, and their names.
BASELINES = {
    "knn_pixels": "raw pixels",
    "knn_untrained": "untrained encoder",
    "knn_start": "start weights",
}

NOT_PLOTTED = {"step", "knn_images"}  # keys of a record without a curve

# The keys of a record that differ between two equal runs. All others are equal bit for bit.
# `health` can be "starved", which depends on data_wait.
TIMINGS = (
    *("images_per_second", "images_per_second_device", "data_wait", "mfu", "memory_gib", "health"),
)


@dataclass(frozen=True)
class LogConfig:
    """Configure what is logged, and how often."""

    every: Operation[Annotated[Duration, Lasting(positive=True)]] = 10
    """Time from one logged step to the next: steps, such as 10, or epochs, such as
    '0.1 epochs'."""
    pictures: Operation[Annotated[int, Interval(ge=1, le=1024)]] = 8
    """Number of images whose two views are shown in tensorboard, at the start and at
    evaluations."""
    ranks_every: Operation[Annotated[Duration, Lasting()]] = 1000
    """Time from one table of the slowest processes to the next: steps, such as 1000, or epochs,
    such as '1 epoch'. It is printed at logged steps and at the end, when there are several
    processes. 0 turns it off."""
    visdom: Operation[Annotated[str, VisdomURL()]] = ""
    """URL of a Visdom server that shows the run too, such as http://localhost:8097. A path, as in
    http://localhost:8097/mine, names the environment, which runs may share. By default it has the
    run's name and id."""
    wandb: Operation[Annotated[str, Project()]] = ""
    """Project of Weights & Biases that shows the run too, such as byol or team/byol. The same run
    goes on there after a restart."""

    def __post_init__(self) -> None:
        simplify(self, "every")
        simplify(self, "ranks_every")

    def due(self, step: int) -> bool:
        """Return whether `step` is logged."""
        return is_due(self.every, step)


class Newest(NamedTuple):
    """Hold the newest value of a figure, and the step that it is of."""

    step: int
    value: float


class MetricsLog:
    """Write RUN/metrics.jsonl and tensorboard's files, and move the progress bar.

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
        total_steps: int = 0,
        momentum: float = 1.0,
    ) -> None:
        """Open the log, and drop later steps that an earlier process left. Raises OSError.

        The progress bar ends at step `stop`. The whole run has `total_steps`, by default `stop`.
        `momentum` is the smallest one of the encoder's norms.
        """
        self._say = terminal.say
        self._run, self._start = run, start
        self._journal = Journal(run, start, terminal.report)
        if not start and (lost := self._journal.dropped):
            anew = "there is no checkpoint, so training begins anew and logs these steps again"
            terminal.say(f"{files.redact(run)}: metrics.jsonl has steps up to {lost:,}, but {anew}")
        self._events = EventLog(run, start)
        self._tracking = Tracking(self._history, self._say)
        self._watch = Watch(total_steps or stop, self.records, terminal.say, momentum)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        self._storing: Future[None] | None = None
        self._failing = False
        self._lines = StepLines(terminal, start, stop)
        for record in self._journal.after(self._events.reached):
            # An earlier process ended before it wrote these points.
            self._events.scalars(*self._point(record))

    @property
    def last(self) -> Record | None:
        """Return the newest record, which an earlier process may have logged."""
        return self._journal.last

    @property
    def baseline(self) -> dict[str, float]:
        """Return the accuracies before the first step by their names, if the run has them."""
        found = {name: self._journal.find(0).get(key) for key, name in BASELINES.items()}
        return {name: value for name, value in found.items() if isinstance(value, float)}

    @property
    def health(self) -> Health | None:
        """Return the health of the run at its newest logged step."""
        return self._watch.health

    def summarize_health(self) -> list[str]:
        """Return what the end of the run tells of its health; nothing where all was well."""
        return self._watch.summarize()

    @property
    def records(self) -> list[Record]:
        """Return all records, of which earlier processes may have logged some."""
        return self._journal.after(-1)

    def tell_gap(self, begin: int, every: int) -> None:
        """Say which lines an earlier process logged and are not there; see `Journal.find_gap`."""
        if gap := self._journal.find_gap(begin, self._start, every):
            lost = f"metrics.jsonl has lost its lines of steps {gap[0]:,} to {gap[1]:,}"
            rest = "training goes on, and curves and what is chosen by them lack these"
            self._say(f"{files.redact(self._run)}: {lost}: {rest}")

    def find_newest(self, key: str) -> Newest | None:
        """Return the newest value of a figure, which an earlier process may have logged."""
        for record in reversed(self.records):
            if isinstance(value := record.get(key), float):
                return Newest(record["step"], value)
        return None

    def advance(self) -> None:
        self._lines.advance()

    def write(self, record: Record) -> None:
        """Log a step to metrics.jsonl, to tensorboard and to the terminal.

        The step that was logged last may be logged again with more keys. The health of the run is
        added to the record.
        """
        last = self._journal.last
        record = record | self._watch.judge(record)
        point = self._point(record, last if last and last["step"] == record["step"] else {})
        self._events.scalars(*point)
        self._journal.write(record)
        self._tracking.scalars(point)
        self._store()
        self._lines.show(record)

    def mark(self, values: Record) -> None:
        """Add values that are no figures to the newest record, if there is one.

        The health is judged again with them.
        """
        if (last := self._journal.last) is not None:
            record = last | values
            self._journal.write(record | self._watch.judge(record))
            self._store()

    def describe(self, fields: dict[str, Any], method: Collection[str], config: LogConfig) -> None:
        """Show the recipe in tensorboard, and let runs be compared by its `method` fields.

        The trackers that `config` asks for are started, and show the recipe too.
        """
        compared = {name: value for name, value in fields.items() if name in method}
        shown = show_fields(fields), compare_fields(compared), lay_out_overview()
        self._events.show(*shown, step=self._start)
        if config.visdom or config.wandb:
            name, known = misplaced.last_name(self._run), run_id(self._run, self._say)
            about = Description(name, known, fields, self._start)
            self._tracking.start(config.visdom, config.wandb, about)

    def pictures(self, views: Tensor, step: int) -> None:
        """Log both views [2, n, 3, S, S] as one picture. They are normalized."""
        pixels = draw_views(views)
        self._events.picture(VIEWS, pixels, step)
        self._tracking.picture(VIEWS, pixels, step)
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
            self._say(f"{reason}; training goes on, the log is kept and written later")
        self._failing = True

    def stop(self) -> None:
        """End the progress bar, the thread and the trackers.

        The trackers are told of a failure where an exception is under way.
        """
        self._lines.stop()
        self._thread.shutdown()
        self._tracking.finish(failed=sys.exc_info()[0] is not None)

    def finish(self) -> None:
        """Write the rest of the log, after `stop`, and report what could not be written."""
        if reason := _failure(self._journal.compact, self._events.flush):
            self.give_up(reason)

    def give_up(self, reason: str) -> None:
        """Report how much of the log will not be written, and the `reason`."""
        lines, events = self._journal.unwritten, self._events.unwritten
        self._say(
            f"{reason}; not written are {lines} lines of {JSONL}, {events} events of tensorboard"
        )

    def _point(self, record: Record, known: Collection[str] = ()) -> Point:
        """Return a record's numbers by curve, except for the keys that are known there."""
        figures = {key: value for key, value in record.items() if key not in known}
        if "knn_top1" in figures:  # the baselines are drawn as lines beside it
            figures = self._baseline_record() | figures
        points = {
            name_curve(key): float(value)
            for key, value in figures.items()
            if key not in NOT_PLOTTED
            and (type(value) is float or (type(value) is int and abs(value) < 2**62))
        }
        return Point(points, record["step"])

    def _history(self) -> list[Point]:
        """Return all points of the log. A tracker's thread calls it."""
        return [self._point(record) for record in self.records]

    def _baseline_record(self) -> Record:
        record = self._journal.find(0)
        return {key: record[key] for key in (*BASELINES, "knn_chance") if key in record}

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

    @property
    def baseline(self) -> dict[str, float]:
        return {}

    def summarize_health(self) -> list[str]:
        return []

    @property
    def records(self) -> list[Record]:
        return []

    def find_newest(self, key: str) -> None:
        pass

    def mark(self, values: Record) -> None:
        pass

    def advance(self) -> None:
        pass

    def write(self, record: Record) -> None:
        pass

    def describe(self, fields: dict[str, Any], method: Collection[str], config: LogConfig) -> None:
        pass

    def pictures(self, views: Tensor, step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def compact(self) -> None:
        pass

    def postpone(self, reason: str) -> None:
        pass
