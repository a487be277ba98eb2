"""Estimate how long a training still takes, from its logged steps."""

import time
from collections import deque
from statistics import median

from rich.progress import ProgressColumn, Task
from rich.text import Text

from engine.log.time_spans import show_span

RECENT = 25  # logged steps, or evaluations, whose median counts


class Remaining:
    """Estimate the time that is left.

    The pace is the median of the recent times from one logged step to the next. So one stall
    changes nothing, and a lasting change counts after half of RECENT logged steps. Evaluations
    take time of their own: their median, as often as there were evaluations so far.
    """

    def __init__(self, stop: int) -> None:
        """Begin with no estimate. `stop` is the last step of this process."""
        self._stop = stop
        self._steps: deque[float] = deque(maxlen=RECENT)  # seconds of a step
        self._evaluations: deque[float] = deque(maxlen=RECENT)  # seconds of one, with its steps
        self._last: tuple[int, float] | None = None  # the newest logged step, and its time
        self._seen = self._evaluated = 0  # steps since the first logged one, and evaluations

    def note(self, step: int, evaluated: bool) -> None:
        """Take the next logged step, whose time includes its evaluation, if it has one."""
        now = time.monotonic()
        last, self._last = self._last, (step, now)
        if last is None or step <= last[0]:  # what comes before the first one is not a usual time
            return
        steps, seconds = step - last[0], now - last[1]
        self._seen += steps
        if evaluated:
            self._evaluated += 1
            self._evaluations.append(seconds - steps * self._pace())
        else:
            self._steps.append(seconds / steps)

    def seconds(self, step: int) -> float | None:
        """Return the seconds that are left after a step, and None while nothing is known."""
        if not self._seen:
            return None
        left = max(0, self._stop - step)
        extra = median(self._evaluations) if self._evaluations else 0.0
        return left * (self._pace() + max(0.0, extra) * self._evaluated / self._seen)

    def text(self, step: int) -> str:
        """Return the time that is left in words, or "" while nothing is known."""
        seconds = self.seconds(step)
        return "" if seconds is None else show_span(seconds)

    def _pace(self) -> float:
        return median(self._steps) if self._steps else 0.0


class TimeLeftColumn(ProgressColumn):
    """Show the time that is left beside a bar of steps. It stands still while no step ends."""

    def __init__(self, remaining: Remaining) -> None:
        super().__init__()
        self._remaining = remaining

    def render(self, task: Task) -> Text:
        return Text(f"left {self._remaining.text(int(task.completed)) or '-:--'}")
