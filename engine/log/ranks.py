"""Show which processes a run waits for."""

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from shards.errors import printable

SHOWN = 5  # processes


class RankTimes:
    """Add up the times of all processes, and show the slowest processes as a table.

    All processes of a step end together, because they exchange gradients. So the slow ones are
    told by the time that they spend alone: waiting for their data and preparing it.
    """

    def __init__(self, hosts: list[str]) -> None:
        """Begin at zero. `hosts` has the name of each process's machine."""
        self._hosts = hosts
        self._clear()

    def _clear(self) -> None:
        self._times = np.zeros((len(self._hosts), 3))  # seconds in all, for data, and alone
        self.steps = 0

    def add(self, times: NDArray[np.float64], steps: int) -> None:
        """Add the seconds of `steps` steps: times [W, 3], in all, waiting for data, and alone."""
        self._times += times
        self.steps += steps

    def table(self) -> Table | None:
        """Return a table of the slowest processes since the last table, and begin at zero.

        It is None when there is only one process, or nothing was added.
        """
        times, steps = self._times, self.steps
        self._clear()
        if len(self._hosts) < 2 or not steps:
            return None
        table = Table("rank", "host", "seconds a step", "data wait", "seconds alone")
        table.title = f"slowest of {len(self._hosts)} processes in the last {steps:,} steps"
        for rank in np.argsort(-times[:, 2], kind="stable")[:SHOWN]:
            whole, waited, alone = times[rank]
            table.add_row(
                str(rank),
                printable(self._hosts[rank]),
                f"{whole / steps:.3f}",
                f"{waited / max(whole, 1e-9):.1%}",
                f"{alone / steps:.3f}",
            )
        return table
