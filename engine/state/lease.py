"""One job at a time trains in a run directory: RUN/lease/00000001.json and its successors.

The newest number counts. Who made it, by exclusive create, holds the run, and shows that it lives
by rewriting it with a rising `beat`. Who finds it unchanged for two periods makes the next number;
a holder that sees a higher one than its own was taken for dead, and has lost the run. Released
leases stay, so that numbers only rise; what a late holder writes has a number that counts no more.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from engine.processes.identity import identity, is_dead
from engine.state.layout import LEASE
from shards.errors import InputError
from shards.storage import files

PERIOD = 10.0  # seconds between two beats
LONGEST_PERIOD = 3600.0  # that a lease may ask others to believe in
RELEASE_TIMEOUT = 15.0  # seconds that a release waits for storage
_POLLS = 5  # looks at a watched lease in each period


@dataclass(frozen=True)
class _Record:
    """What a lease's object says; the defaults stand for one that is gone or damaged."""

    number: int
    owner: str = ""  # like no other's
    host: str = "an unknown host"
    process: str = ""  # identity of the process that beats
    agents: tuple[str, ...] = ()
    period: float = PERIOD
    beat: int = 0
    released: bool = False

    def content(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def is_dead(self) -> bool:
        """Whether all were on this machine and are gone.

        The beating process counts beside the launchers, which it may outlive.
        """
        return all(is_dead(identity) for identity in (self.process, *self.agents))


class Lease:
    """A run directory that this job holds, from `acquire`."""

    def __init__(self, run: str, record: _Record) -> None:
        self.lost = False
        """Whether another job has taken the run."""
        self._run = run
        self._record = record
        self._taker = ""  # host
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="lease", daemon=True)

    def check(self) -> None:
        """Raise InputError once the run was lost, as far as the last beat knows."""
        if self.lost:
            raise InputError(
                f"{files.redact(self._run)} was taken over by another job ({self._taker}) while "
                "this one did not answer: stop that job before this one is started again, "
                "or give another --run"
            )

    def confirm(self) -> None:
        """Look now. Raises InputError when the run was lost, OSError when nobody can tell."""
        self._look()
        self.check()

    def release(self) -> None:
        """End the beats and let the next job in at once. A lost lease stays as it is."""
        self._stop.set()
        self._thread.join(RELEASE_TIMEOUT)

    def _take(self) -> bool:
        """Make the object and start to beat; False when another job was faster."""
        # The number may have been used and removed meanwhile: then a higher one is there.
        if not files.create(_url(self._run, self._record.number), self._record.content()):
            return False
        self._look()
        if not self.lost:
            self._thread.start()
        return not self.lost

    def _look(self) -> None:
        own, newest = self._record, _newest(self._run)
        if newest is None or newest.number < own.number:
            return  # removed by hand; the next beat writes it again
        # The own number is another's where somebody removed the folder and started a job.
        if newest.number > own.number or newest.owner not in ("", own.owner):
            self._taker = newest.host
            self.lost = True

    def _hold(self) -> None:
        """The thread: it alone rewrites the object, so that no beat can follow the release."""
        while not self._stop.wait(self._record.period):
            self._write(replace(self._record, beat=self._record.beat + 1))
            if self.lost:
                return
        self._write(replace(self._record, released=True))

    def _write(self, record: _Record) -> None:
        with contextlib.suppress(OSError):  # an outage of storage must not end the job
            self._look()
            if not self.lost:
                self._record = record
                files.write(_url(self._run, record.number), record.content())


def acquire(run: str, agents: Sequence[str], period: float, report: Callable[[str], None]) -> Lease:
    """Hold the run directory for this job until `release`; rank 0 alone calls this.

    A job that was restarted by its launcher, and one whose holder is known to be dead or has
    released it, gets it at once. Otherwise the holder is watched for two of its periods.

    Args:
        agents: `agent_identity` of each process of the job.
        period: Seconds between beats.

    Raises InputError when another job holds it.
    """
    newest = _newest(run)
    if newest is not None and not (
        newest.released or set(newest.agents) & set(agents) or newest.is_dead()
    ):
        newest = _watch(run, newest, report)
    record = _Record(
        number=newest.number + 1 if newest else 1,
        owner=uuid.uuid4().hex,
        host=socket.gethostname(),
        process=identity(os.getpid()),
        agents=tuple(sorted(set(agents))),
        period=period,
    )
    lease = Lease(run, record)
    if not lease._take():
        raise _in_use(run, _newest(run))
    with contextlib.suppress(OSError):  # older ones do no harm
        for number in _numbers(run):
            if number < record.number and not files.discard(_url(run, number), run, report):
                break
    return lease


def is_free(run: str) -> bool:
    """Whether no job holds the run, as far as can be told at once."""
    newest = _newest(run)
    return newest is None or newest.released or newest.is_dead()


def _watch(run: str, first: _Record, report: Callable[[str], None]) -> _Record | None:
    """What is the newest after two periods without a sign of life. Raises InputError on one."""
    report(
        f"{files.redact(files.join(run, LEASE))}: held by {first.host}; "
        f"watching for {2 * first.period:g} s whether it is alive"
    )
    # Counted in sleeps, not by a clock: the holder cannot beat while a look hangs in an outage.
    for _ in range(2 * _POLLS):
        time.sleep(first.period / _POLLS)
        newest = _newest(run)
        if newest is None or newest.released:
            return newest
        if newest != first:
            raise _in_use(run, newest)
    return first


def _in_use(run: str, holder: _Record | None) -> InputError:
    host = holder.host if holder else _Record.host
    return InputError(
        f"{files.redact(run)} is in use by another job on {host} (its lease changes): "
        "stop that job, or give another --run"
    )


def _newest(run: str) -> _Record | None:
    numbers = _numbers(run)
    if not numbers:
        return None
    number, content = max(numbers), b""
    try:
        content = files.read(_url(run, number))
        there = json.loads(content)
        if not 0 < there["period"] <= LONGEST_PERIOD:
            raise ValueError
        return _Record(
            number=number,
            owner=str(there["owner"]),
            host=str(there["host"]),
            process=str(there["process"]),
            agents=tuple(map(str, there["agents"])),
            period=float(there["period"]),
            beat=int(there["beat"]),
            released=bool(there["released"]),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _Record(number, beat=zlib.crc32(content))  # it can be watched all the same


def _numbers(run: str) -> list[int]:
    names = files.list_names(files.join(run, LEASE))
    return [int(name[:-5]) for name in names if re.fullmatch(r"\d{8,}\.json", name)]


def _url(run: str, number: int) -> str:
    return files.join(run, LEASE, f"{number:08d}.json")
