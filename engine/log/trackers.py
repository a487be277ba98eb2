"""Say what a tracker is: a program elsewhere, such as Visdom, that shows what a run logs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

UNSENT = 10.0  # seconds that the end of a run waits for what a tracker has not got yet
ANSWER = 5.0  # seconds that a server has for an answer


class Point(NamedTuple):
    """Hold the figures of one logged step."""

    values: dict[str, float]  # by the names of their curves
    step: int


class Description(NamedTuple):
    """Hold what a tracker tells about the run beside its curves."""

    name: str
    id: str  # it stays the same when the run is continued, and no other run has it
    fields: dict[str, Any]  # the recipe by dotted names, without secrets
    step: int  # training continues from here


class Tracker(ABC):
    """Show a run elsewhere. One thread calls all methods, and each of them may raise anything."""

    name: str

    @abstractmethod
    def start(self, history: Sequence[Point]) -> str:
        """Show the recipe and all that was logged so far, and return where it can be seen.

        It is called at the beginning, and again after a failure.
        """

    @abstractmethod
    def scalars(self, points: Sequence[Point]) -> None:
        """Add points, each with curves that have no point at this step or a later one."""

    @abstractmethod
    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Show an RGB picture [H, W, 3]."""

    @abstractmethod
    def finish(self, failed: bool) -> None:
        """Send what is left, within some seconds. `failed` tells if an exception ended the run."""
