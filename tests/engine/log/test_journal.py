"""The log of a run, wherever it is kept, whenever its writer is killed."""

import itertools
import json
import secrets
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.log import journal
from engine.log.journal import Journal, pause, read
from shards.storage import files, local_files
from tests.helpers.fault_proxy import FaultProxy


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 0.1 * step, **more}


def records(*steps: int) -> list[dict[str, Any]]:
    return [record(step) for step in steps]


def whole(run: str) -> list[dict[str, Any]]:
    """What stands in metrics.jsonl alone."""
    if not files.exists(f"{run}/metrics.jsonl"):
        return []
    return [json.loads(line) for line in files.read(f"{run}/metrics.jsonl").splitlines()]


def parts(run: str) -> list[str]:
    names = files.list_names(f"{run}/metrics")
    return [name for name in names if name.endswith(".jsonl")]


@pytest.fixture
def memory() -> str:
    return f"memory://{secrets.token_hex(6)}/run"


@pytest.fixture(params=["local", "memory", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/run"
    return {"local": str(tmp_path / "run"), "memory": memory}[request.param]


def test_killed_and_opened_again(run: str) -> None:
    first = Journal(run, 0)
    for step in range(1, 7):
        first.write(record(step))
        if step in (2, 3, 5):
            first.flush()
    assert read(run) == records(1, 2, 3, 4, 5)  # a kill takes step 6
    second = Journal(run, 4)
    assert second.last == record(4)
    assert whole(run) == read(run) == records(1, 2, 3, 4)
    assert not parts(run)
    for step in (5, 6):
        second.write(record(step, again=True))
    second.flush()
    expected = [*records(1, 2, 3, 4), record(5, again=True), record(6, again=True)]
    assert read(run) == expected
    second.compact()
    assert whole(run) == read(run) == expected
    assert not parts(run)


def test_lost_lines_are_found(run: str) -> None:
    log = Journal(run, 0)
    for step in (0, 1, 10, 20, 30):
        log.write(record(step))
    for start, every, gap in (
        (30, 10, None),
        (39, 10, None),  # the next line would be that of step 40
        (40, 10, None),
        (41, 10, (31, 41)),
        (41, 20, None),  # there is a line every 20 steps now
        (40, 1, None),  # and now at each step, from the next one on
        (90, 10, (31, 90)),
    ):
        assert log.find_gap(0, start, every) == gap, (start, every)
    empty = Journal(f"{run}/other", 0)
    assert empty.find_gap(0, 0, 10) is None
    assert empty.find_gap(0, 10, 10) is None
    assert empty.find_gap(0, 50, 10) == (1, 50)
    assert empty.find_gap(45, 50, 10) is None  # a branch that began there


def test_of_a_run_without_a_line(run: str) -> None:
    assert read(run) == []
    log = Journal(run, 0)
    log.flush()
    log.compact()
    assert log.last is None
    assert read(run) == []
    assert files.exists(f"{run}/metrics.jsonl") == files.is_local(run)
    assert not parts(run)


def test_a_damaged_part_of_a_run_without_a_line(run: str) -> None:
    log = Journal(run, 0)
    files.write(f"{run}/metrics/00000001-000000-0123abcd.jsonl", b'{"step": 1, "lo')
    log.compact()
    assert read(run) == []
    assert not parts(run)


def test_floats_come_back_bit_for_bit(run: str) -> None:
    values = [0.1 + 0.2, 1 / 3, 1e-310, 12345678901234567.0]
    log = Journal(run, 0)
    for step, value in enumerate(values):
        log.write({"step": step, "loss": value})
    log.flush()
    assert [found["loss"] for found in read(run)] == values
    Journal(run, 9)
    assert [found["loss"] for found in read(run)] == values


def test_a_local_file_grows_line_by_line(tmp_path: Path) -> None:
    """Whoever reads its end sees each line once, in one file."""
    log = Journal(str(tmp_path), 0)
    with (tmp_path / "metrics.jsonl").open() as follower:
        for step in (1, 2, 3):
            log.write(record(step))
            log.flush()
            assert follower.read() == json.dumps(record(step)) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("between", ["nothing", "flush", "compact", "reopen"])
def test_a_step_that_is_completed_later(run: str, between: str) -> None:
    log = Journal(run, 0)
    for step in (1, 2):
        log.write(record(step))
    if between == "flush":
        log.flush()
    elif between == "compact":
        log.compact()
    elif between == "reopen":
        log.flush()
        log = Journal(run, 2)
    assert log.last == record(2)
    log.write({"step": 2, "loss": 7.0, "knn_top1": 0.5})
    expected = [record(1), {"step": 2, "loss": 7.0, "knn_top1": 0.5}]
    assert log.last == expected[1]
    log.flush()
    assert read(run) == expected
    if files.is_local(run):
        assert whole(run) == expected
    log.write(record(3))
    log.flush()
    assert read(run) == [*expected, record(3)]
    log.compact()
    assert whole(run) == [*expected, record(3)]


def test_a_part_left_of_a_cut_off_removal_takes_nothing_away(memory: str) -> None:
    log = Journal(memory, 0)
    for line in (record(1), record(1, knn_top1=0.5), record(2), record(3)):
        log.write(line)
        log.flush()
    contents = {name: files.read(f"{memory}/metrics/{name}") for name in parts(memory)}
    log.compact()
    compacted = files.read(f"{memory}/metrics.jsonl")
    expected = [record(1, knn_top1=0.5), record(2), record(3)]
    for count in range(len(contents) + 1):
        for left in itertools.combinations(contents, count):
            for name in left:
                files.write(f"{memory}/metrics/{name}", contents[name])
            assert read(memory) == expected
            Journal(memory, 2)
            assert whole(memory) == expected[:2]
            assert not parts(memory)
            files.write(f"{memory}/metrics.jsonl", compacted)


class Killed(BaseException):
    pass


class Kill:
    """Dies before or after the n-th change of storage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.before, self.changes = -1, True, 0
        for name in ("write", "remove"):
            monkeypatch.setattr(files, name, self._deadly(getattr(files, name)))

    def arm(self, at: int, before: bool) -> None:
        self.at, self.before, self.changes = at, before, 0

    def _deadly(self, change: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            here, self.changes = self.changes == self.at, self.changes + 1
            if here and self.before:
                raise Killed
            change(*args)
            if here:
                raise Killed

        return call


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_any_moment(monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    """What a flush returned from is there, once; what was never written is not."""
    kill = Kill(monkeypatch)
    for at in itertools.count():
        run = f"memory://{secrets.token_hex(6)}/run"
        safe = written = 0
        kill.arm(at, before)
        try:
            for start in (0, 3):
                safe = start  # it may or may not have dropped the rest
                log = Journal(run, start)
                for step in range(start + 1, start + 5):
                    log.write(record(step))
                    written = step
                    if step % 3:
                        log.flush()
                        safe = step
                    if step % 4 == 3:
                        log.compact()
                        safe = step
        except Killed:
            pass
        else:
            break
        kill.arm(-1, before)
        found = read(run)
        assert found == records(*range(1, len(found) + 1))
        assert safe <= len(found) <= written
        for start in (safe, 1):
            log = Journal(run, start)
            assert whole(run) == read(run) == records(*range(1, min(start, safe) + 1))
            assert not parts(run)
    assert at > 10


def test_garbage_and_half_written_lines_are_left_out(run: str) -> None:
    garbage = b'{"step": 1}\ngarbage\n[]\n{"step": "x"}\n\xff\n{"loss": 3}\n{"step": 2}\n{"st'
    files.write(f"{run}/metrics.jsonl", garbage)
    files.write(f"{run}/metrics/00000003-000000-ab.jsonl", b'{"step": 3}\n{"step": 4, "lo')
    told: list[str] = []
    assert read(run, report=told.append) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert files.read(f"{run}/metrics.jsonl") == garbage  # reading changes nothing
    log = Journal(run, 3, told.append)
    # A line that is cut off at the end is what a kill leaves, and its step is taken again.
    assert told == ["metrics.jsonl: 5 lines that cannot be read are left out"] * 2
    log.write({"step": 4})
    log.flush()
    log.compact()
    assert files.read(f"{run}/metrics.jsonl") == b"".join(
        b'{"step": %d}\n' % step for step in (1, 2, 3, 4)
    )


@pytest.mark.parametrize(
    "line",
    [
        *('{"step": true}', '{"step": -1}', '{"step": 1e400}', '{"step": 1.0}', '{"step": null}'),
        *('{"step": 1' + "0" * 30 + "}", '{"step": 1, "loss": [1]}', '{"step": 1, "a": {"b": 1}}'),
        *('{"step": 1, "loss": "a"}', '{"step": 1, "knn_top1": "[/x]"}', "[" * 10**5),
        '{"step": 1, "a": ' + "9" * 5000 + "}",
    ],
)
def test_lines_of_other_types_are_left_out(memory: str, line: str) -> None:
    files.write(f"{memory}/metrics.jsonl", b'{"step": 0}\n' + line.encode() + b'\n{"step": 2}\n')
    assert read(memory) == [{"step": 0}, {"step": 2}]
    assert Journal(memory, 2).last == {"step": 2}


def test_a_clean_log_is_not_written_again(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Journal(memory, 0)
    log.write(record(1))
    log.compact()
    kill = Kill(monkeypatch)
    log.compact()
    Journal(memory, 1)
    assert kill.changes == 0


def test_read_while_the_writer_goes_on(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens between two requests of a reader, it misses no line that was there."""
    read_object = files.read
    for moment in range(5):
        run = f"{memory}{moment}"
        log = Journal(run, 0)
        for step in (1, 2, 3):
            log.write(record(step))
            log.flush()
        calls = itertools.count()

        def read_later(url: str, log: Journal = log, at: int = moment, n: Any = calls) -> bytes:
            if next(n) == at:
                log.write(record(4))
                log.compact()
                log.write(record(5))
                log.flush()
            return read_object(url)

        monkeypatch.setattr(files, "read", read_later)
        monkeypatch.setattr(journal, "_REQUESTS", 1)
        found = read(run)
        monkeypatch.setattr(files, "read", read_object)
        assert found[:3] == records(1, 2, 3)
        assert found[3:] in ([], records(4))


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_flushed_by_one_thread_while_another_writes(kind: str, tmp_path: Path, memory: str) -> None:
    run = str(tmp_path) if kind == "local" else memory
    log, done = Journal(run, 0), threading.Event()

    def store() -> None:
        while not done.is_set():
            log.flush()
            log.compact()

    thread = threading.Thread(target=store)
    thread.start()
    for step in range(1, 301):
        log.write(record(step))
        log.write({"step": step, "more": step})
    done.set()
    thread.join()
    log.compact()
    assert log.unwritten == 0
    assert whole(run) == read(run) == [record(step, more=step) for step in range(1, 301)]


# Outages -----------------------------------------------------------------------------------------


def fail(url: str = "s3://bucket/run", *_: object) -> None:
    raise OSError(f"{url}: gave up: the store is away")


@pytest.mark.parametrize("call", [Journal.flush, Journal.compact])
def test_lines_outlast_an_outage(
    memory: str, monkeypatch: pytest.MonkeyPatch, call: Callable[[Journal], None]
) -> None:
    log = Journal(memory, 0)
    log.write(record(1))
    log.flush()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", fail)
        for step in (2, 3):
            log.write(record(step))
            with pytest.raises(OSError, match="gave up"):
                call(log)
        assert log.unwritten == 2
        assert read(memory) == records(1)

        def fail_late(*_: object) -> None:
            log.write(record(3, knn_top1=0.5))
            fail()

        patch.setattr(files, "write", fail_late)
        with pytest.raises(OSError, match="gave up"):
            call(log)
    call(log)
    assert log.unwritten == 0
    assert read(memory) == [*records(1, 2), record(3, knn_top1=0.5)]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Journal(str(tmp_path), 0)
    log.write(record(1))
    log.flush()

    def half(path: str, _: str) -> Any:
        with Path(path).open("ab") as file:
            file.write(b'{"step": 2, "lo')
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(local_files, "open", half, raising=False)
        log.write(record(2))
        with pytest.raises(OSError, match="No space"):
            log.flush()
    assert read(str(tmp_path)) == records(1)
    log.write(record(3))
    log.flush()
    assert whole(str(tmp_path)) == records(1, 2, 3)


def test_only_metrics_jsonl_is_ever_rewritten(s3: str, proxy: FaultProxy) -> None:
    """And a flush is one PUT, whatever the length of the log."""
    run = f"{s3}/run"
    for start in (0, 3, 3):
        log = Journal(run, start)
        for step in range(start + 1, start + 8):
            log.write(record(step))
            before = proxy.requests("metrics")
            log.flush()
            assert proxy.requests("metrics") == before + 1
            if step == 5:
                log.write(record(step, knn_top1=0.5))
                log.flush()
                log.compact()
    puts = [request.path for request in proxy.log if request.method == "PUT"]
    found = read(run)
    assert len(puts) > 20
    again = {path for path in puts if puts.count(path) > 1}
    assert {path.rpartition("/")[2].partition("?")[0] for path in again} == {"metrics.jsonl"}
    assert found == [record(s, knn_top1=0.5) if s == 5 else record(s) for s in range(1, 11)]


def test_steps_of_more_than_eight_digits(memory: str) -> None:
    """A part of a later step is read later, though its longer name comes first in a listing."""
    log = Journal(memory, 0)
    for step, loss in ((99_999_999, 1.0), (100_000_000, 2.0)):
        log.write(record(step))
        log.write(record(100_000_005, loss=loss))
        log.flush()
    assert read(memory)[-1]["loss"] == 2.0
    assert [line["step"] for line in read(memory)] == [99_999_999, 100_000_000, 100_000_005]


def test_flushes_grow_rare() -> None:
    """Five days leave a few hundred objects, the first hour's log is minutes old at most."""
    seconds, files, at = 0.0, 0, {}
    while seconds < 5 * 86400:
        seconds += pause(files)
        files += 1
        at[seconds] = pause(files)
    assert files < 250
    assert pause(0) == pause(1) == 30
    assert max(wait for time, wait in at.items() if time < 3600) < 240


def test_a_long_log_takes_little_more_memory_than_its_lines(tmp_path: Path) -> None:
    """A million steps are 100,000 records, which one process keeps for days."""
    figures = {f"figure_{number}": 0.1 for number in range(20)}
    log = Journal(str(tmp_path), 0)
    tracemalloc.start()
    try:
        for step in range(1, 1001):
            log.write({"step": step} | figures)
            log.flush()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 1.6 * (tmp_path / "metrics.jsonl").stat().st_size
