"""Many jobs reach for one run at once, and one gets it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from engine.processes.identity import agent_identity
from engine.state.lease import Lease, acquire
from shards.errors import InputError
from shards.storage import exclusive
from tests.helpers.leases import PERIOD, leave, numbers, read
from tests.helpers.ranks import Ranks

STATES: dict[str, Callable[[str], None]] = {
    "fresh": lambda _: None,
    "stale": lambda run: leave(run, 1),
    "released": lambda run: leave(run, 1, released=True),
}


@pytest.mark.parametrize("state", STATES)
def test_one_of_many_wins(store: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have looked, and watched, before the first one creates its own."""
    STATES[state](store)
    barrier, create = threading.Barrier(8, timeout=60), exclusive.create

    def create_together(url: str, content: bytes) -> bool:
        barrier.wait()
        return create(url, content)

    def attempt(name: str) -> list[Lease]:
        with suppress(InputError):
            return [acquire(store, [name], PERIOD, lambda _: None)]
        return []

    monkeypatch.setattr(exclusive, "create", create_together)
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


def test_one_of_many_processes_wins(tmp_path: Path) -> None:
    with closing(Ranks(4)) as jobs:
        assert sum(jobs.run(win, str(tmp_path), size=4)) == 1
