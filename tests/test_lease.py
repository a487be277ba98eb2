"""Leases: one job at a time in a run directory, whoever dies, hangs or comes late."""

import json
import multiprocessing
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from engine import identity as identity_module
from engine import lease as lease_module
from engine.identity import agent_identity
from engine.lease import Lease, acquire
from shards import storage
from shards.errors import InputError
from tests.test_identity import identity_of_the_dead

PERIOD = 0.2
NEVER = 3600.0  # a period in which no beat comes
ROOT = Path(__file__).parent.parent
SPAWN = multiprocessing.get_context("spawn")


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
    """Stands for `time`: sleeping takes none, and at one moment something happens."""

    def __init__(self, moment: float, event: Callable[[], object]) -> None:
        self._left = moment
        self._events = [event]

    def sleep(self, seconds: float) -> None:
        self._left -= seconds
        if self._left <= 0 and self._events:
            self._events.pop()()


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    all_jobs = Jobs()
    yield all_jobs
    all_jobs.close()


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL where nothing is yet."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return str(tmp_path) if request.param == "local" else f"memory://{secrets.token_hex(6)}"


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def leave(run: str, number: int, **fields: Any) -> None:
    """A lease that a job on another machine made."""
    document = {"owner": f"owner {number}", "host": "far", "process": "far:1:2:3", "beat": 0}
    document |= {"agents": ["far:1:2:3"], "period": PERIOD, "released": False} | fields
    storage.write(url(run, number), json.dumps(document).encode())


def read(run: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(storage.read(url(run, number)))
    return found


def url(run: str, number: int) -> str:
    return f"{run}/lease/{number:08d}.json"


def numbers(run: str) -> list[int]:
    return [int(name.removesuffix(".json")) for name in storage.list_names(f"{run}/lease")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# Taking and releasing ---------------------------------------------------------------------------


def test_take_beat_release_and_take_again(store: str, jobs: Jobs) -> None:
    first = jobs.acquire(store, "a")
    assert numbers(store) == [1]
    wait_until(lambda: read(store, 1)["beat"] >= 2)
    assert not read(store, 1)["released"]
    first.confirm()
    first.release()
    assert read(store, 1)["released"]
    jobs.acquire(store, "b").confirm()
    first.release()  # again does nothing
    assert numbers(store) == [2]
    assert not jobs.reports, "nobody was watched"


# Who gets it at once ----------------------------------------------------------------------------


def test_a_job_restarted_by_its_launcher(run: str, jobs: Jobs) -> None:
    before = jobs.acquire(run, "agent 1", "agent 2")
    jobs.acquire(run, "agent 2", "agent 3").confirm()
    assert not jobs.reports, "nobody was watched"
    with pytest.raises(InputError, match="taken over"):
        before.confirm()


def test_after_a_killed_job_of_this_machine(run: str, jobs: Jobs) -> None:
    with holder(run):
        pass
    assert not read(run, 1)["released"]
    jobs.acquire(run, "b").confirm()
    assert numbers(run) == [2]
    assert not jobs.reports, "nobody was watched"


@pytest.mark.parametrize("alive", ["launcher", "process"])
def test_one_that_lives_is_enough(
    run: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, alive: str
) -> None:
    dead, living = identity_of_the_dead(), agent_identity()
    if alive == "launcher":
        leave(run, 1, process=dead, agents=[dead, living])
    else:
        leave(run, 1, process=living, agents=[dead])
    monkeypatch.setattr(lease_module, "time", Clock(1, lambda: None))
    jobs.acquire(run, "b")
    assert len(jobs.reports) == 1, "it was watched"


# Who is watched ---------------------------------------------------------------------------------


def test_a_living_job_keeps_its_run(run: str, jobs: Jobs) -> None:
    there = jobs.acquire(run, "a", period=0.5)
    with pytest.raises(InputError) as error:
        jobs.acquire(run, "b")
    host = read(run, 1)["host"]
    assert str(error.value) == (
        f"{run} is in use by another job on {host} (its lease changes): "
        "stop that job, or give another --run"
    )
    assert jobs.reports == [f"{run}/lease: held by {host}; watching for 1 s whether it is alive"]
    there.confirm()
    assert numbers(run) == [1]


def test_a_silent_job_loses_its_run(store: str, jobs: Jobs) -> None:
    leave(store, 7)
    jobs.acquire(store, "b").confirm()
    assert numbers(store) == [8]
    assert len(jobs.reports) == 1, "it was watched"


@pytest.mark.parametrize(("moment", "taken"), [(1, False), (10, False), (19.5, False), (25, True)])
def test_a_watch_takes_two_of_the_holders_periods(
    run: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, moment: float, taken: bool
) -> None:
    leave(run, 1, period=10)
    clock = Clock(moment, lambda: leave(run, 1, period=10, beat=1))
    monkeypatch.setattr(lease_module, "time", clock)
    if taken:
        jobs.acquire(run, "b").confirm()
    else:
        with pytest.raises(InputError, match="in use by another job on far"):
            jobs.acquire(run, "b")
    assert numbers(run) == [2 if taken else 1]


@pytest.mark.parametrize("event", ["released", "removed", "next", "next released"])
def test_what_may_happen_in_a_watch(
    run: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    leave(run, 1)
    events: dict[str, Callable[[], object]] = {
        "released": lambda: leave(run, 1, released=True),
        "removed": lambda: storage.remove(f"{run}/lease"),
        "next": lambda: leave(run, 2, host="near"),
        "next released": lambda: leave(run, 2, released=True),
    }
    monkeypatch.setattr(lease_module, "time", Clock(PERIOD, events[event]))
    if event == "next":
        with pytest.raises(InputError, match="in use by another job on near"):
            jobs.acquire(run, "b")
        return
    jobs.acquire(run, "b").confirm()
    assert numbers(run) == [{"released": 2, "removed": 1, "next released": 3}[event]]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"beat": 3}', '{"agents": null}', '{"period": -1}', "[" * 100_000]
)
def test_a_damaged_lease_is_watched(
    run: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    storage.write(url(run, 1), content.encode())
    clock = Clock(10, lambda: storage.write(url(run, 1), b'{"version": 2, "beat": 1}'))
    monkeypatch.setattr(lease_module, "time", clock)
    with pytest.raises(InputError, match="an unknown host"):
        jobs.acquire(run, "b")
    jobs.acquire(run, "b").confirm()
    assert numbers(run) == [2]


# One among many ---------------------------------------------------------------------------------

STATES: dict[str, Callable[[str], None]] = {
    "fresh": lambda _: None,
    "stale": lambda run: leave(run, 1),
    "released": lambda run: leave(run, 1, released=True),
}


@pytest.mark.parametrize("state", STATES)
def test_one_of_many_wins(store: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have looked, and watched, before the first one creates its own."""
    STATES[state](store)
    barrier, create = threading.Barrier(8, timeout=60), storage.create

    def create_together(url: str, content: bytes) -> bool:
        barrier.wait()
        return create(url, content)

    def attempt(name: str) -> list[Lease]:
        with suppress(InputError):
            return [acquire(store, [name], PERIOD, lambda _: None)]
        return []

    monkeypatch.setattr(storage, "create", create_together)
    with ThreadPoolExecutor(8) as pool:
        won = [lease for wins in pool.map(attempt, "abcdefgh") for lease in wins]
    # In memory, exclusive create is not quite so: there who was overwritten finds itself lost.
    assert len(won) == 1 or store.startswith("memory:")
    for lease in won:
        lease._look()
    assert [lease.lost for lease in won].count(False) == 1
    for lease in won:
        lease.release()
    assert numbers(store) == [1 if state == "fresh" else 2]
    assert read(store, numbers(store)[0])["released"]


def win(run: str) -> bool:
    """Whether this process, which lives on, gets the run."""
    with suppress(InputError):
        acquire(run, [agent_identity()], 1.0, lambda _: None)
        return True
    return False


def test_one_of_many_processes_wins(run: str) -> None:
    with ProcessPoolExecutor(4, SPAWN) as pool:
        assert sum(pool.map(win, [run] * 4)) == 1


def test_a_number_that_was_used_and_removed_wins_nothing(
    run: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look and a create, others may have come, gone and been followed."""
    create = storage.create

    def create_late(url: str, content: bytes) -> bool:
        leave(run, 3, host="near")
        return create(url, content)

    leave(run, 1, released=True)
    monkeypatch.setattr(storage, "create", create_late)
    with pytest.raises(InputError, match="in use by another job on near"):
        jobs.acquire(run, "b")
    assert read(run, 3)["owner"] == "owner 3"


# Losing it --------------------------------------------------------------------------------------


def test_a_beat_finds_that_the_run_was_lost(run: str, jobs: Jobs) -> None:
    lease = jobs.acquire(run, "a")
    lease.check()
    leave(run, 2)
    wait_until(lambda: lease.lost)
    with pytest.raises(InputError) as error:
        lease.check()
    assert str(error.value) == (
        f"{run} was taken over by another job (far) while this one did not answer: "
        "stop that job before this one is started again, or give another --run"
    )
    lease.release()
    assert not read(run, 1)["released"]
    assert read(run, 2)["owner"] == "owner 2"


def test_a_look_before_the_commit_finds_it_too(store: str, jobs: Jobs) -> None:
    lease = jobs.acquire(store, "a", period=NEVER)
    lease.confirm()
    leave(store, 2)
    lease.check()
    with pytest.raises(InputError, match="taken over by another job"):
        lease.confirm()
    with pytest.raises(InputError, match="taken over by another job"):
        lease.check()


def test_release_looks_first(run: str, jobs: Jobs) -> None:
    lease = jobs.acquire(run, "a", period=NEVER)
    leave(run, 2)
    lease.release()
    assert not read(run, 1)["released"]


def test_a_run_removed_and_started_anew_is_lost(run: str, jobs: Jobs) -> None:
    """The new job's number is the same."""
    lease = jobs.acquire(run, "a", period=NEVER)
    storage.remove(run)
    jobs.acquire(run, "b", period=NEVER).confirm()
    with pytest.raises(InputError, match="taken over by another job"):
        lease.confirm()


def hold(run: str, pipe: Connection) -> None:
    lease = acquire(run, [agent_identity()], PERIOD, lambda _: None)
    pipe.send("held")
    wait_until(lambda: lease.lost)
    pipe.send("lost")


@contextmanager
def holder(run: str) -> Iterator[tuple[int, Callable[[], str]]]:
    """A process that holds the run: its number, and what it says next."""
    pipe, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=hold, args=(run, theirs))
    process.start()

    def hear() -> str:
        assert pipe.poll(60)
        return str(pipe.recv())

    assert hear() == "held"
    assert process.pid is not None
    yield process.pid, hear
    process.kill()
    process.join()


def test_a_process_that_was_stopped_wakes_up_lost(run: str, jobs: Jobs) -> None:
    with holder(run) as (pid, hear):
        os.kill(pid, signal.SIGSTOP)
        lease = jobs.acquire(run, "b")
        assert len(jobs.reports) == 1, "it was watched"
        os.kill(pid, signal.SIGCONT)
        assert hear() == "lost"
    lease.confirm()


def test_what_a_late_holder_writes_counts_no_more(run: str, jobs: Jobs) -> None:
    lease = jobs.acquire(run, "b", period=NEVER)
    lease.release()
    lease = jobs.acquire(run, "c", period=NEVER)
    leave(run, 1)
    lease.confirm()
    lease.release()
    jobs.acquire(run, "d").confirm()
    assert numbers(run) == [3]
    assert not jobs.reports, "nobody was watched"


# Outages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["list_names", "read", "write"])
def test_an_outage_ends_no_beats(
    run: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    lease = jobs.acquire(run, "a")
    failures = []

    def fail(*_: object) -> None:
        failures.append(1)
        raise OSError("the network is down")

    with monkeypatch.context() as outage:
        outage.setattr(storage, call, fail)
        wait_until(lambda: len(failures) >= 3)
        lease.check()
        if call != "write":
            with pytest.raises(OSError, match="the network is down"):
                lease.confirm()
    beat = read(run, 1)["beat"]
    wait_until(lambda: read(run, 1)["beat"] > beat)
    lease.confirm()
    monkeypatch.setattr(storage, call, fail)
    lease.release()
    monkeypatch.undo()
    assert not read(run, 1)["released"]


def test_older_numbers_that_cannot_be_removed_do_no_harm(
    run: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str) -> None:
        raise PermissionError(url)

    leave(run, 1, released=True)
    with monkeypatch.context() as policy:
        policy.setattr(storage, "remove", refuse)
        jobs.acquire(run, "a").release()
        assert numbers(run) == [1, 2]
    jobs.acquire(run, "b").confirm()
    assert numbers(run) == [3]


def test_without_proc_a_job_is_watched(
    run: str, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "_PROC", tmp_path / "nothing")
    own = agent_identity()
    assert own == agent_identity(), "the same for all the life of the process"
    assert not identity_module.is_dead(own)
    jobs.acquire(run, own, period=NEVER)
    monkeypatch.setattr(lease_module, "time", Clock(1, lambda: None))
    jobs.acquire(run, "b")
    assert len(jobs.reports) == 1, "it was watched"
