"""A start that is refused because another job has the run says how to end that job."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.processes.identity import agent_identity
from engine.state import lease as lease_module
from shards.errors import InputError
from tests.engine.processes.test_identity import identity_of_the_dead
from tests.helpers.leases import PERIOD, Clock, Jobs, leave


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    all_jobs = Jobs()
    yield all_jobs
    all_jobs.close()


@pytest.mark.parametrize(
    ("process", "agents", "how"),
    [
        ("boot:1:40:7", ["boot:1:30:6", "other:1:50:8"], " (there: kill -TERM 30 40, after"),
        ("boot:1:40:7", ["boot:1:40:7"], " (there: kill -TERM 40, after"),
        ("boot:1:1:7", [], ", or give"),
        ("boot:1:-1:7", ["boot:1:30:6"], ", or give"),
        ("boot:1:4 5; rm:7", ["a"], ", or give"),
    ],
)
def test_a_refusal_names_the_processes(
    tmp_path: Path,
    jobs: Jobs,
    monkeypatch: pytest.MonkeyPatch,
    process: str,
    agents: list[str],
    how: str,
) -> None:
    """Those of the first one's machine, because the lease names no other host."""
    run = str(tmp_path)
    holder: dict[str, Any] = {"process": process, "agents": agents, "host": "far"}
    leave(run, 1, **holder)
    clock = Clock(PERIOD, lambda: leave(run, 1, beat=1, **holder))
    monkeypatch.setattr(lease_module, "time", clock)
    with pytest.raises(InputError) as error:
        jobs.acquire(run, "b")
    assert f"by another job on far (its lease changes): stop that job{how}" in str(error.value)


def test_a_refusal_names_no_launcher_that_has_ended(
    tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes live on when it was killed."""
    run = str(tmp_path)
    holder: dict[str, Any] = {"process": agent_identity(), "agents": [identity_of_the_dead()]}
    leave(run, 1, **holder)
    clock = Clock(PERIOD, lambda: leave(run, 1, beat=1, **holder))
    monkeypatch.setattr(lease_module, "time", clock)
    with pytest.raises(InputError, match=rf"there: kill -TERM {os.getpid()}, after"):
        jobs.acquire(run, "b")
