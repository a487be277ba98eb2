"""Leases: one job at a time in a run directory, whoever dies, hangs or comes late."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from engine.processes import identity as identity_module
from engine.processes.identity import agent_identity
from engine.state import lease as lease_module
from engine.state.lease import acquire
from shards.errors import InputError
from shards.storage import exclusive, files
from tests.engine.processes.test_identity import identity_of_the_dead
from tests.helpers.leases import PERIOD, Clock, Jobs, leave, numbers, read, url
from tests.helpers.processes import FORKED

SOUND = json.dumps(
    {"owner": "a", "host": "far", "process": "far:1:2:3", "agents": [], "period": 1.0, "beat": 1}
    | {"released": False}
)
NEVER = lease_module.LONGEST_PERIOD  # no beat comes in so short a test


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    all_jobs = Jobs()
    yield all_jobs
    all_jobs.close()


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


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


def test_a_job_that_was_frozen_looks_before_it_goes_on(jobs: Jobs, store: str) -> None:
    """No beat was due for longer than two periods, so the next check reads the storage."""
    lease = jobs.acquire(store, "a", period=NEVER)
    leave(store, 2)
    lease.check()  # nothing has told it yet
    lease._beaten -= 2 * NEVER + 1
    with pytest.raises(InputError, match=r"was taken over by another job \(far\)"):
        lease.check()


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
        f"{run} is in use by another job on {host} (its lease changes): stop that job (there: "
        f"kill -TERM {os.getpid()}, after which it saves and ends), or give another --run-url"
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
        "removed": lambda: files.remove(f"{run}/lease"),
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
    "content",
    [
        *("", "{", "[]", '{"beat": 3}', '{"agents": null}', '{"period": -1}', "[" * 100_000),
        SOUND.replace("1.0", "NaN"),
        SOUND.replace("1.0", "1e400"),
        SOUND.replace("1.0", "3600"),
        SOUND.replace("[]", '"a"'),
        SOUND.replace('"far"', "3"),
        SOUND.replace("far", "x" * 10**4),
        SOUND.replace("false", "0"),
        SOUND.replace('"beat": 1', '"beat": -1'),
    ],
    ids=range(15),
)
def test_a_damaged_lease_is_watched(
    run: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    files.write(url(run, 1), content.encode())
    clock = Clock(10, lambda: files.write(url(run, 1), b'{"version": 2, "beat": 1}'))
    monkeypatch.setattr(lease_module, "time", clock)
    with pytest.raises(InputError, match="an unknown host"):
        jobs.acquire(run, "b")
    assert jobs.reports[0].endswith("watching for 20 s whether it is alive")
    jobs.acquire(run, "b").confirm()
    assert numbers(run) == [2]


# One among many ---------------------------------------------------------------------------------


def test_a_number_that_was_used_and_removed_wins_nothing(
    run: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look and a create, others may have come, gone and been followed."""
    create = exclusive.create

    def create_late(url: str, content: bytes) -> bool:
        leave(run, 3, host="near")
        return create(url, content)

    leave(run, 1, released=True)
    monkeypatch.setattr(exclusive, "create", create_late)
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
        "stop that job before this one is started again, or give another --run-url"
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
    files.remove(run)
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
    pipe, theirs = FORKED.Pipe()
    process = FORKED.Process(target=hold, args=(run, theirs))
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
        outage.setattr(files, call, fail)
        wait_until(lambda: len(failures) >= 3)
        lease.check()
        if call != "write":
            with pytest.raises(OSError, match="the network is down"):
                lease.confirm()
    beat = read(run, 1)["beat"]
    wait_until(lambda: read(run, 1)["beat"] > beat)
    lease.confirm()
    monkeypatch.setattr(files, call, fail)
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
        policy.setattr(files, "remove", refuse)
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
