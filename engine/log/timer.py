"""Measure how fast steps are, and which share of their time they wait for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """Measure the speed of the steps since the timer was made.

    A new timer is made after each logged step and each checkpoint. So the time of evaluations and
    checkpoints does not count.
    """

    def __init__(self) -> None:
        self.steps, self.waited, self._start = 0, 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds since the timer was made."""
        return time.perf_counter() - self._start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self, batch: int) -> dict[str, float]:
        """Return the images per second, and the share (0 to 1) of the time spent waiting for data.

        `batch` is the number of images in each step.
        """
        seconds = self.seconds
        return {
            "images_per_second": self.steps * batch / seconds,
            "data_wait": self.waited / seconds,
        }
