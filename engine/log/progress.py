"""Show how far a long piece of work is: as a bar on a terminal, else as a line now and then."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from engine.log.terminal import Terminal
from engine.log.time_spans import show_span
from shards.errors import printable

FIRST, SECONDS = 2.0, 20.0  # Without a terminal, the first line comes then, and others after it.


class Progress:
    """The progress of one piece of work. On processes other than the first it shows nothing."""

    def __init__(self, terminal: Terminal, name: str, total: int, start: int, bars: Bars) -> None:
        self._terminal, self._bars, self._shown = terminal, bars, terminal.console.is_terminal
        self._name, self._total, self._done, self._start = name, total, start, start
        self._task = bars.add_task(printable(name), total=total, completed=start)
        self._begun = time.monotonic()
        self._due = self._begun + FIRST

    def name(self, text: str) -> None:
        """Say what is in hand now, such as the learning rate and the epoch."""
        self._name = text
        self._bars.update(self._task, description=printable(text))

    def advance(self, count: int = 1) -> None:
        """Count so many items as done."""
        self._done = min(self._total, self._done + count)
        self._bars.update(self._task, completed=self._done)
        now = time.monotonic()
        if not self._shown and now >= self._due:
            self._due = now + SECONDS
            done = f"{self._done:,} of {self._total:,}"
            self._terminal.say(f"{self._name}: {done}, {self.left()} left")

    def left(self) -> str:
        """Return the estimated time that is left, in words."""
        made = max(1, self._done - self._start)
        return show_span((time.monotonic() - self._begun) * (self._total - self._done) / made)


@contextmanager
def show_progress(terminal: Terminal, name: str, total: int, start: int = 0) -> Iterator[Progress]:
    """Show the progress of the block, which has `total` items, of which `start` are done."""
    console = terminal.console
    bars = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )
    with bars:
        yield Progress(terminal, name, total, start, bars)
