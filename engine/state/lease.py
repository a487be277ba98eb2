"""Make sure that only one job at a time trains in a run directory.

The lease is the file RUN/lease/00000001.json, later 00000002.json and so on. Only the file with the
highest number counts. The job that created it holds the run; when several try, only one succeeds,
but for stores without exclusive create (`exclusive.py`), where the others notice at the next beat.
The holder shows that it is alive by rewriting the file with a rising `beat`. When another job finds
the file unchanged for two periods, it takes the holder for dead and creates the next number. A
holder that sees a number above its own has lost the run. A released lease stays until there is a
next one, so that numbers only rise. Only the first job's lease is removed, when its start was
refused before anything of a run was written. What a former holder writes late has a number that no
longer counts.
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
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, NamedTuple

from annotated_types import Interval, MaxLen

from engine.processes.identity import find_pids, identity, is_dead
from engine.state import layout
from engine.state.layout import LEASE, NAMES
from shards.documents import Natural, build, parse_json
from shards.errors import InputError
from shards.storage import exclusive, files, local_files
from shards.storage.entries import list_entries

PERIOD = 10.0  # seconds between two beats
LONGEST_PERIOD = 3 * PERIOD  # seconds; nobody writes a longer one, and such a file is damaged
RELEASE_TIMEOUT = 15.0  # seconds that a release waits for storage
_POLLS = 5  # looks at a watched lease in each period


@dataclass(frozen=True)
class _Record:
    """Hold the content of a lease's file. The defaults stand for a file that is damaged or gone."""

    number: int
    owner: str = ""  # a text that no other lease has
    host: Annotated[str, MaxLen(255)] = "an unknown host"
    process: str = ""  # identity of the process that writes the beats
    agents: tuple[str, ...] = ()  # identities of the launchers of all processes of the job
    period: Annotated[float, Interval(gt=0, le=LONGEST_PERIOD)] = PERIOD
    beat: Natural = 0
    released: bool = False

    def content(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def is_dead(self) -> bool:
        """Return whether the job's launchers are known to have ended, and the beating process too.

        Only processes of this machine are ever known to have ended. The process that writes the
        beats is checked as well, because it may outlive its launcher.
        """
        return all(is_dead(identity) for identity in (self.process, *self.agents))


_FIELDS = {field.name for field in fields(_Record)} - {"number"}


class Lease:
    """The right of this job to train in a run directory, as `acquire` returns it."""

    def __init__(self, run: str, record: _Record) -> None:
        self._made = layout.find_missing(run, LEASE)
        self._refused = False
        self.lost = False
        """Whether another job has taken the run, as far as this job has seen."""
        self._run = run
        self._record = record
        self._taker = ""  # host of the job that has taken the run
        self._stop = threading.Event()
        self._beating, self._beaten = False, time.monotonic()
        self._thread = threading.Thread(target=self._hold, name="lease", daemon=True)

    @property
    def sign(self) -> tuple[int, str, str]:
        """Return this lease's number and owner, which `holds_number` looks for, and its host."""
        return self._record.number, self._record.owner, self._record.host

    def check(self) -> None:
        """Raise InputError when another job is known to have taken the run.

        This knows what the last beat has found. It reads the storage, as `confirm` does, only when
        no beat was tried for two periods. Then this machine was frozen, and another job may have
        taken the run meanwhile.
        """
        if not self._beating and time.monotonic() - self._beaten > 2 * self._record.period:
            self._beaten = time.monotonic()
            with contextlib.suppress(OSError):  # the next beat will tell
                self._look()
        if self.lost:
            raise InputError(
                f"{files.redact(self._run)} was taken over by another job ({self._taker}) while "
                "this one did not answer: stop that job before this one is started again, "
                "or give another --run-url"
            )

    def confirm(self) -> None:
        """Read the storage, and raise InputError when another job has taken the run.

        Raises OSError when the storage does not answer, because then nobody can tell.
        """
        self._look()
        self.check()

    def release(self, refused: bool = False) -> None:
        """Stop the beats and mark the lease as released, so that the next job need not wait.

        A lost lease stays as it is. This waits at most RELEASE_TIMEOUT seconds.

        Args:
            refused: The start failed. If it has begun the run and written nothing else, the lease
                is removed, with the folders that were made for it.
        """
        self._refused = refused
        self._stop.set()
        self._thread.join(RELEASE_TIMEOUT)

    def _take(self) -> bool:
        """Create the file and start the beats. Return False when another job was faster."""
        # Creating it also succeeds if another job has used and removed this number meanwhile. Then
        # there is a higher number, which `_look` finds.
        if not exclusive.create(_url(self._run, self._record.number), self._record.content()):
            return False
        self._look()
        if not self.lost:
            self._thread.start()
        return not self.lost

    def _look(self) -> None:
        own, newest = self._record, _newest(self._run)
        if newest is None or newest.number < own.number:
            return  # somebody removed the file; the next beat writes it again
        # The same number has another owner when somebody removed the folder and started a job.
        if newest.number > own.number or newest.owner not in ("", own.owner):
            self._taker = newest.host
            self.lost = True

    def _hold(self) -> None:
        """Write the beats until the release, and then the release. This runs in the thread.

        Nothing else rewrites the file, so no beat can follow the release.
        """
        while not self._stop.wait(self._record.period):
            self._write(replace(self._record, beat=self._record.beat + 1))
            if self.lost:
                return
        if not (self._refused and self._vanish()):
            self._write(replace(self._record, released=True))

    def _vanish(self) -> bool:
        """Remove the lease if nothing but it was written. Return whether it was removed."""
        with contextlib.suppress(OSError):
            self._look()
            alone = {LEASE} == {*files.list_names(self._run)} & {*NAMES}
            if self.lost or self._record.number > 1 or not alone:
                return False
            files.remove(_url(self._run, self._record.number))
            local_files.remove_empty(self._made)
            return True
        return False

    def _write(self, record: _Record) -> None:
        self._beating = True
        with contextlib.suppress(OSError):  # a storage outage must not end the job
            self._look()
            if not self.lost:
                self._record = record
                files.write(_url(self._run, record.number), record.content())
        self._beating, self._beaten = False, time.monotonic()


def acquire(run: str, agents: Sequence[str], period: float, report: Callable[[str], None]) -> Lease:
    """Hold the run directory for this job until `release`. Only rank 0 calls this.

    The job gets it at once when its own launcher has restarted it, when the holder is known to have
    ended, and when the holder has released it. Otherwise the holder is watched for two of its
    periods.

    Args:
        run: URL of the run directory.
        agents: `agent_identity` of each process of the job.
        period: Seconds between beats.
        report: Is called with lines about the waiting and about files that cannot be removed.

    Raises InputError when another job holds it, and OSError when the store has no exclusive create.
    """
    if not files.is_local(run) and not exclusive.is_exclusive():
        report(
            f"{files.redact(run)} is held without exclusive create ({exclusive.EXCLUSIVE}=no): two "
            f"jobs that start at the same moment may both train there for up to {period:g} s, "
            "until one notices the other and ends"
        )
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
    with contextlib.suppress(OSError):  # older leases do no harm
        for number in _numbers(run):
            if number < record.number and not files.discard(_url(run, number), run, report):
                break
    return lease


class Sight(NamedTuple):
    """What somebody who does not train sees of the job that holds or held a run."""

    host: str
    released: bool
    dead: bool  # whether it is known to have ended, which only its own machine can tell
    silent: float | None  # seconds since its last beat, by the clocks of the store and of here
    period: float  # seconds between two beats


def describe_holder(run: str) -> Sight | None:
    """Describe who holds the run, without waiting; None when nobody ever has. Raises OSError."""
    newest = _newest(run)
    if newest is None:
        return None
    name = f"{newest.number:08d}.json"
    there = list_entries(files.join(run, LEASE))
    beaten = next((entry.modified for entry in there if entry.name == name), None)
    silent = None if beaten is None else max(0.0, time.time() - beaten)
    return Sight(newest.host, newest.released, newest.is_dead(), silent, newest.period)


def holds_number(run: str, number: int, owner: str) -> bool:
    """Return whether the lease of that number is in the run, and is the owner's. Raises OSError."""
    try:
        there = parse_json(files.read(_url(run, number)))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(there, dict) and there.get("owner") == owner


def is_free(run: str) -> bool:
    """Return whether no job holds the run, as far as can be told without waiting."""
    newest = _newest(run)
    return newest is None or newest.released or newest.is_dead()


def _watch(run: str, first: _Record, report: Callable[[str], None]) -> _Record | None:
    """Watch the holder of the lease `first` for two of its periods.

    Returns:
        The lease that the next one follows: `first`, or a lease that was released meanwhile. None
        when no lease is there any more.

    Raises InputError when the lease changes, because then its holder is alive.
    """
    report(
        f"{files.redact(files.join(run, LEASE))}: held by {first.host}; "
        f"watching for {2 * first.period:g} s whether it is alive"
    )
    # The loop counts its sleeps instead of reading a clock. While storage does not answer, reading
    # the lease takes long, but the holder cannot write a beat either.
    for _ in range(2 * _POLLS):
        time.sleep(first.period / _POLLS)
        newest = _newest(run)
        if newest is None or newest.released:
            return newest
        if newest != first:
            raise _in_use(run, newest)
    return first


def _in_use(run: str, holder: _Record | None) -> InputError:
    holder = holder or _Record(0)
    pids = " ".join(map(str, find_pids((holder.process, *holder.agents))))
    how = f" (there: kill -TERM {pids}, after which it saves and ends)" if pids else ""
    return InputError(
        f"{files.redact(run)} is in use by another job on {holder.host} (its lease changes): "
        f"stop that job{how}, or give another --run-url"
    )


def _newest(run: str) -> _Record | None:
    numbers = _numbers(run)
    if not numbers:
        return None
    number, content = max(numbers), b""
    try:
        content = files.read(_url(run, number))
        there = parse_json(content)
        if isinstance(there, dict) and there.keys() >= _FIELDS:
            return build(_Record, there | {"number": number})
    except (FileNotFoundError, ValueError, InputError):
        pass
    return _Record(number, beat=zlib.crc32(content))  # a damaged lease can still be watched


def _numbers(run: str) -> list[int]:
    names = files.list_names(files.join(run, LEASE))
    return [int(name[:-5]) for name in names if re.fullmatch(r"[0-9]{8,}\.json", name)]


def _url(run: str, number: int) -> str:
    return files.join(run, LEASE, f"{number:08d}.json")
