"""Send what a run logs to a tracker, from a thread that training never waits for."""

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.log.trackers import UNSENT, Point, Tracker

MOST = 1000  # logged steps that wait for the thread
PAUSE = 1.0  # seconds from one sending to the next, at least
LONGEST = 60.0  # seconds from one sending to the next, at most
RETRY = 30.0  # seconds after a failure


class Sender:
    """Tell one tracker what a run logs.

    When a tracker fails, or is so slow that too many steps wait, it is started anew with the whole
    log, which has all that is missing. So curves get complete again, whatever has happened.
    """

    def __init__(
        self, tracker: Tracker, history: Callable[[], list[Point]], say: Callable[[str], None]
    ) -> None:
        """Start the thread. `history` reads the whole log, and `say` prints a line.

        A step must be in the log before it is given to `scalars`.
        """
        self._tracker, self._history, self._say = tracker, history, say
        self._lock = threading.Lock()  # guards the five below
        self._waiting: deque[Point] = deque(maxlen=MOST)
        self._pictures: dict[str, tuple[NDArray[np.uint8], int]] = {}  # the newest ones
        self._unseen: set[str] = set()  # names of the pictures that were not sent
        self._given = 0  # steps that were logged
        self._complete = False  # whether the tracker has all but what is waiting
        self._arrived = 0  # of the steps that were logged
        self._reached: dict[str, int] = {}  # the last step of each curve
        self._failure = ""  # why the last sending failed
        self._ended_badly = False  # whether an exception ended the training
        self._place, self._told = "", False  # where the run can be seen, and whether that was said
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name=tracker.name, daemon=True)
        self._thread.start()

    def scalars(self, point: Point) -> None:
        """Add the figures of a step."""
        with self._lock:
            self._complete = self._complete and len(self._waiting) < MOST
            self._waiting.append(point)
            self._given += 1

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Show an RGB picture [H, W, 3] in the place of the one before it."""
        with self._lock:
            self._pictures[name] = pixels, step
            self._unseen.add(name)

    def stop(self, failed: bool) -> None:
        """Tell the thread to send what is left, and not to wait for more."""
        self._ended_badly = failed
        self._stopping.set()

    def join(self, until: float) -> None:
        """Wait for the thread until a time of the monotonic clock, and say what was not sent."""
        self._thread.join(max(0.0, until - time.monotonic()))
        late = "it takes too long" if self._thread.is_alive() else ""
        if missing := self._given - self._arrived:
            self._say(
                f"{self._tracker.name}: {missing:,} logged steps did not arrive "
                f"({self._failure or late}); metrics.jsonl has them, and the next start sends them"
            )
        elif reason := self._failure or late:
            self._say(f"{self._tracker.name}: {reason}")

    def _work(self) -> None:
        pause = 0.0
        last = False
        while not last:
            last = self._stopping.wait(pause)
            began = time.monotonic()
            try:
                self._send()
                self._recover()
                if last:
                    self._tracker.finish(self._ended_badly)
                # At most a tenth of the time goes into sending.
                pause = min(max(PAUSE, 9 * (time.monotonic() - began)), LONGEST)
            except Exception as error:
                self._fail(error)
                pause, last = RETRY, self._stopping.is_set()

    def _send(self) -> None:
        """Send what is waiting, or everything if the tracker is not complete."""
        with self._lock:
            anew, self._complete = not self._complete, True
            points, given = list(self._waiting), self._given
            self._waiting.clear()
            if anew:
                self._unseen |= self._pictures.keys()
            pictures = {name: self._pictures[name] for name in sorted(self._unseen)}
            self._unseen.clear()
        try:
            if anew:
                history = self._history()  # it has the points, too
                self._place = self._tracker.start(history)
                self._reached = {}
                self._keep_new(history)
            elif fresh := self._keep_new(points):
                self._tracker.scalars(fresh)
            for name, (pixels, step) in pictures.items():
                self._tracker.picture(name, pixels, step)
        except BaseException:
            with self._lock:
                self._complete = False
            raise
        self._arrived = given

    def _keep_new(self, points: list[Point]) -> list[Point]:
        """Leave out values that their curve has already, because the log had them at the start."""
        kept = []
        for values, step in points:
            new = {
                name: value for name, value in values.items() if step > self._reached.get(name, -1)
            }
            self._reached |= dict.fromkeys(new, step)
            if new:
                kept.append(Point(new, step))
        return kept

    def _fail(self, error: Exception) -> None:
        """Say what is wrong, unless the last attempt failed too; `join` says it at the end."""
        lines = str(error).splitlines() or [type(error).__name__]
        told, self._failure = bool(self._failure), lines[0].rstrip(".")
        if not told and not self._stopping.is_set():
            self._say(
                f"{self._tracker.name}: {self._failure}; training goes on, and what is missing is "
                "sent when this is over"
            )

    def _recover(self) -> None:
        """Say where the run can be seen, at the beginning and after a failure."""
        if self._failure or not self._told:
            self._say(f"{self._tracker.name}: {self._place}")
        self._failure, self._told = "", True


def join_all(senders: list[Sender], failed: bool) -> None:
    """End the threads of all senders, and wait for them together for some seconds at most.

    `failed` tells whether an exception ended the training.
    """
    for sender in senders:
        sender.stop(failed)
    until = time.monotonic() + UNSENT
    for sender in senders:
        sender.join(until)
