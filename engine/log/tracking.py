"""Open the trackers that a recipe asks for, beside metrics.jsonl and tensorboard."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from engine.log.sending import Sender, join_all
from engine.log.trackers import Description, Point, Tracker
from engine.log.visdom_tracker import VisdomTracker
from engine.log.wandb_tracker import WandbTracker, check_key
from shards.errors import InputError

INSTALL = {
    # Its build needs an older setuptools than pip takes, and its server an older tornado.
    "visdom": "pip install 'setuptools<81' wheel && "
    "pip install --no-build-isolation visdom 'tornado<6.6'",
    "wandb": "pip install 'byol-engine[wandb]'",
}


def check_trackers(visdom: str, wandb: str) -> None:
    """Raise InputError when a tracker that is asked for cannot be used here.

    Args:
        visdom: The URL of a Visdom server, or "".
        wandb: A project of W&B, or "".
    """
    for package, wanted in (("visdom", visdom), ("wandb", wandb)):
        if wanted and find_spec(package) is None:
            raise InputError(
                f"log.{package} needs the package {package}: run `{INSTALL[package]}`, or leave "
                f"--log.{package} out"
            )
    if wandb:
        check_key()


class Tracking:
    """Tell all trackers of a run what it logs. Nothing here waits for them, except `finish`."""

    def __init__(self, history: Callable[[], list[Point]], say: Callable[[str], None]) -> None:
        """Have no trackers yet. `history` reads the whole log, and `say` prints a line."""
        self._history, self._say = history, say
        self._senders: list[Sender] = []

    def start(self, visdom: str, wandb: str, description: Description) -> None:
        """Start a thread for each tracker that is asked for, as `check_trackers` takes them."""
        trackers: list[Tracker] = []
        if visdom:
            trackers.append(VisdomTracker(visdom, description))
        if wandb:
            trackers.append(WandbTracker(wandb, description))
        self._senders = [Sender(tracker, self._history, self._say) for tracker in trackers]

    def scalars(self, point: Point) -> None:
        """Add the figures of a step, which the log has already."""
        for sender in self._senders:
            sender.scalars(point)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Show an RGB picture [H, W, 3]."""
        for sender in self._senders:
            sender.picture(name, pixels, step)

    def finish(self, failed: bool) -> None:
        """Wait some seconds for what is not sent yet, and say what did not arrive.

        `failed` tells whether an exception ended the training.
        """
        join_all(self._senders, failed)
