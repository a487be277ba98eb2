"""Take leases as a job does, and write leases as other jobs leave them behind."""

import json
import time
from collections.abc import Callable
from typing import Any

from engine.state.lease import Lease, acquire
from shards.storage import files

PERIOD = 0.2


class Jobs:
    """Takes leases as rank 0 of any job would, and releases them after the test."""

    def __init__(self) -> None:
        self.reports: list[str] = []
        self._leases: list[Lease] = []

    def acquire(self, run: str, *agents: str, period: float = PERIOD) -> Lease:
        lease = acquire(run, agents, period, self.reports.append)
        self._leases.append(lease)
        return lease

    def close(self) -> None:
        for lease in self._leases:
            lease.release()


class Clock:
    """A replacement for `time` in which sleeping takes no real time.

    When the sleeps add up to `moment` seconds, `event` is called once.
    """

    def __init__(self, moment: float, event: Callable[[], object]) -> None:
        self._left = moment
        self._events = [event]

    def monotonic(self) -> float:
        """Return the real clock, by which a lease tells whether it was frozen."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        self._left -= seconds
        if self._left <= 0 and self._events:
            self._events.pop()()


def leave(run: str, number: int, **fields: Any) -> None:
    """Write a lease as a job on another machine would.

    Args:
        fields: Replace fields of the lease's document.
    """
    document = {"owner": f"owner {number}", "host": "far", "process": "far:1:2:3", "beat": 0}
    document |= {"agents": ["far:1:2:3"], "period": PERIOD, "released": False} | fields
    files.write(url(run, number), json.dumps(document).encode())


def read(run: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files.read(url(run, number)))
    return found


def url(run: str, number: int) -> str:
    return f"{run}/lease/{number:08d}.json"


def numbers(run: str) -> list[int]:
    return [int(name.removesuffix(".json")) for name in files.list_names(f"{run}/lease")]
