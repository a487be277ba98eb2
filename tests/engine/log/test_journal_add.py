"""What others add to a run's log: read at once, taken in by its writer, never lost."""

import secrets
from pathlib import Path
from typing import Any

import pytest

from engine.log import journal
from engine.log.journal import Journal, add, read
from shards.storage import files
from tests.engine.log.test_journal import parts, record, records, whole


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{secrets.token_hex(6)}"


def test_it_is_read_at_once_and_taken_in(run: str) -> None:
    log = Journal(run, 0)
    for step in (1, 2, 3):
        log.write(record(step))
    log.flush()
    add(run, {"step": 2, "linear_top1": 0.5})
    add(run, {"step": 3, "linear_top1": 0.6})
    expected = [record(1), record(2, linear_top1=0.5), record(3, linear_top1=0.6)]
    assert sorted(map(repr, read(run)), key=len) == sorted(map(repr, expected), key=len)
    log.write(record(4))
    log.compact()
    assert [set(line) for line in whole(run)] == [set(line) for line in [*expected, record(4)]]
    assert whole(run) == read(run) == [*expected, record(4)]
    assert parts(run) == []
    log.write(record(5))
    log.flush()
    log.compact()
    assert whole(run) == [*expected, record(4), record(5)]
    assert Journal(run, 5).last == record(5)


def test_of_a_step_that_was_not_logged(run: str) -> None:
    log = Journal(run, 0)
    for step in (1, 5):
        log.write(record(step))
    add(run, {"step": 3, "knn": 0.5})
    log.compact()
    assert whole(run) == [record(1), {"step": 3, "knn": 0.5}, record(5)]
    assert log.last == record(5)


def test_the_writer_s_own_values_win(run: str) -> None:
    log = Journal(run, 0)
    log.write(record(1))
    add(run, {"step": 1, "loss": 99.0, "knn": 0.5})
    log.compact()
    assert whole(run) == [record(1, knn=0.5)]
    log.write({"step": 1, "late": 7.0})  # an evaluation that completes its step
    log.compact()
    assert whole(run) == [record(1, knn=0.5, late=7.0)]


def test_the_newest_of_several_additions_counts(run: str) -> None:
    """Also after the writer has taken in the older one."""
    log = Journal(run, 0)
    log.write(record(1))
    for value in (0.5, 0.6, 0.7):
        add(run, {"step": 1, "knn": value, "loss": value})
        log.compact()
        assert read(run) == whole(run) == [record(1, knn=value)]
    log = Journal(run, 1)
    add(run, {"step": 1, "knn": 0.8})
    log.compact()
    assert read(run) == whole(run) == [record(1, knn=0.8)]
    assert log.last == record(1, knn=0.8)


def test_an_older_step_is_completed_not_replaced(run: str) -> None:
    log = Journal(run, 0)
    for step in (1, 2, 4):
        log.write(record(step))
    log.flush()
    log.write({"step": 1, "late": 7.0})
    log.write(record(3))
    log.flush()
    log.compact()
    assert read(run) == whole(run) == [record(1, late=7.0), record(2), record(3), record(4)]
    assert log.last == record(4)


def test_when_nobody_writes(run: str) -> None:
    log = Journal(run, 0)
    log.write(record(1))
    log.compact()
    add(run, {"step": 1, "knn": 0.5})
    assert read(run) == [record(1, knn=0.5)]
    Journal(run, 1)  # the next start
    assert whole(run) == [record(1, knn=0.5)]
    assert parts(run) == []


def test_what_comes_between_reading_and_removal_stays(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Journal(run, 0)
    log.write(record(1))
    add(run, {"step": 1, "knn": 0.5})
    write = files.write

    def write_and_add(url: str, content: bytes) -> Any:
        if url.endswith(journal.JSONL):
            monkeypatch.setattr(files, "write", write)
            add(run, {"step": 1, "linear": 0.25})
        return write(url, content)

    monkeypatch.setattr(files, "write", write_and_add)
    log.compact()
    assert len(parts(run)) == 1
    assert read(run) == [record(1, knn=0.5, linear=0.25)]
    log.compact()
    assert whole(run) == [record(1, knn=0.5, linear=0.25)]


def test_garbage_harms_nothing(run: str) -> None:
    log = Journal(run, 0)
    log.write(record(1))
    files.write(f"{run}/metrics/00000001-000000-abc.jsonl", b'{"step": "x"}\n{nonsense')
    log.compact()
    assert whole(run) == records(1)
