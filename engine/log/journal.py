"""Write and read RUN/metrics.jsonl: one line for each logged step, on any storage.

On a local disk the file grows line by line. In an object store no object can grow, so new lines are
written to parts that never change, with one PUT each. The name of a part, such as
RUN/metrics/00000121-000004-3f9a2c51.jsonl, holds the step of its first line, its number and an id
of its writer. Now and then `compact` writes all lines to RUN/metrics.jsonl and then removes the
parts. At any moment, even after a kill, the file and the parts together are the log. Lines that are
in both count once.

An evaluation of a checkpoint adds its results to a step of the log from another process. It writes
a part too (`add`), even on a local disk.
"""

import itertools
import json
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from shards.storage import files, local_files
from shards.threads import run_in_threads

JSONL = "metrics.jsonl"
PARTS = "metrics"
_REQUESTS = 8  # at once, because each takes a while
_NEWEST = 20  # lines that tell how many steps lie between two

# The keys of a record that hold a text, and that others look for.
STOPPED_EARLY = "stopped_early"  # why the training ended at that step
FAILED = "evaluation_failed"  # why an evaluation gave no figures

Record = dict[str, Any]

_PLAIN = (int, float, str, bool, type(None))
_NUMBERS = (
    *("epoch", "loss", "lr", "tau", "images_per_second", "knn_top1", "online_top1"),
    *("feature_std", "feature_rank", "grad_norm", "knn_pixels", "knn_untrained"),
)


def read(
    run: str, tail: int | None = None, report: Callable[[str], None] | None = None
) -> list[Record]:
    """Read the log of a run, which may still be training: one record for each step, in order.

    The list is empty when there is no log. When a step was written twice, the later values count.
    Lines that are not records, such as half-written ones, are left out. Raises OSError.

    Args:
        tail: Read only about so many bytes at the end of metrics.jsonl, which must have more.
        report: Is called with how many lines are left out, but for one that is being written.
    """
    content, parts = _contents(run, tail)
    return _merged([content, *parts.values()], report)


def add(run: str, record: Record) -> None:
    """Add values to a step's record, from a process that is not the log's writer.

    From then on `read` returns them. They get to metrics.jsonl when the log's writer next compacts
    it, or when the next writer opens the log. Raises OSError.
    """
    name = f"{record['step']:08d}-{0:06d}-{secrets.token_hex(4)}.jsonl"
    files.write(files.join(run, PARTS, name), _line(record))


class Journal:
    """Write the log of a run. A log has one writer at a time.

    The log is opened at step `start`, and lines of later steps are dropped. `flush` and `compact`
    may run in other threads while `write` is called. When they raise OSError the lines are kept,
    and the next call writes them.
    """

    def __init__(self, run: str, start: int, report: Callable[[str], None] = print) -> None:
        """Open the log, and move the lines that are in parts to metrics.jsonl. Raises OSError.

        `report` is called with a line about parts that the store refuses to remove, and about lines
        that cannot be read, which are lost when the file is written anew.
        """
        self._run, self._url, self._report = run, files.join(run, JSONL), report
        self._local = files.is_local(run)
        found, parts = _contents(run)
        merged = _merged([found, *parts.values()], report)
        records = [record for record in merged if record["step"] <= start]
        # The last step that is dropped; 0 when none is.
        self.dropped: int = max((r["step"] for r in merged[len(records) :]), default=0)
        self._lines = {record["step"]: _line(record) for record in records}
        self._written: dict[int, frozenset[str]] = {}  # by step, the keys that this writer wrote
        self._sets: dict[frozenset[str], frozenset[str]] = {}  # those sets, each of them once
        self._last = records[-1] if records else None
        self._pending: dict[int, bytes] = {}
        self._lock = threading.Lock()  # guards the five above; no storage call runs under it
        self._storing = threading.Lock()  # one thread at a time writes to storage

        # The last step in a local file; inf when nobody knows how the file ends.
        self._end: float = records[-1]["step"] if records else -1
        self._writer = secrets.token_hex(4)  # so no name is used twice, even after a restart
        self._parts = 0  # parts that this writer has made
        self._loose = 0  # parts among them that are not in metrics.jsonl yet
        self._flushed = time.monotonic()
        whole = b"".join(self._lines.values())
        if whole != found or (self._local and not files.exists(self._url)):
            files.write(self._url, whole)
        self._emptied: set[str] = set()  # parts without lines that could not be removed
        self._drop_parts([name for name, content in parts.items() if content])
        self._emptied |= {name for name, content in parts.items() if not content}

    @property
    def last(self) -> Record | None:
        """Return the newest record."""
        return self._last

    def find_gap(self, begin: int, start: int, every: int) -> tuple[int, int] | None:
        """Return the first and the last step of which lines are missing; None when none are.

        A run that began at step `begin` continues from `start`. So many steps have no line between
        two that have one: `every`, or the most that lie between two of the newest lines.
        """
        known = [begin, *self._lines][-_NEWEST:]
        pause = max([every, *(later - step for step, later in itertools.pairwise(known))])
        return (known[-1] + 1, start) if start > known[-1] + pause else None

    @property
    def due(self) -> bool:
        """Return whether it is time for a flush."""
        return time.monotonic() - self._flushed >= pause(self._loose)

    @property
    def unwritten(self) -> int:
        """Return how many lines are in memory only."""
        return len(self._pending)

    def after(self, step: int) -> list[Record]:
        """Return the records of the steps after `step`. Any thread may call it."""
        with self._lock:
            lines = [line for known, line in self._lines.items() if known > step]
        return [json.loads(line) for line in lines]

    def find(self, step: int) -> Record:
        """Return the record of a step, or an empty one."""
        found: Record = json.loads(self._lines.get(step, b"{}"))
        return found

    def write(self, record: Record) -> None:
        """Keep a step's record in memory until the next flush.

        When the step has a record already, the values are added to it.
        """
        step = record["step"]
        with self._lock:
            known: Record = json.loads(self._lines.get(step, b"{}"))
            keys = self._written.get(step, frozenset[str]()).union(record)
            self._written[step] = self._sets.setdefault(keys, keys)  # a set is larger than a line
            record = known | record
            if self._last is None or step >= self._last["step"]:
                self._last = record
            late = bool(self._lines) and step < next(reversed(self._lines))
            self._lines[step] = self._pending[step] = _line(record)
            if late:
                self._lines = dict(sorted(self._lines.items()))

    def flush(self) -> None:
        """Write the lines that are in memory only to storage. Raises OSError."""
        self._flushed = time.monotonic()
        with self._storing, self._taken() as lines:
            if self._local:
                self._extend(lines)
            elif lines:
                name = f"{min(lines):08d}-{self._parts:06d}-{self._writer}.jsonl"
                url = files.join(self._run, PARTS, name)
                files.write(url, b"".join(lines.values()))
                self._parts += 1
                self._loose += 1

    def compact(self) -> None:
        """Write all lines to metrics.jsonl, then remove the parts. Raises OSError.

        Late in the longest recipe these are 10 MB. That is little for each checkpoint, but too much
        for each line.
        """
        with self._storing:
            parts = [name for name in _parts(self._run) if name not in self._emptied]
            self._take_in(name for name in parts if self._writer not in name)
            with self._taken() as lines:
                if self._local and not parts:
                    self._extend(lines)
                elif lines or parts:
                    self._rewrite()
            self._drop_parts(parts)

    def _take_in(self, names: Iterable[str]) -> None:
        """Merge the records that others added, whose values are newer than those in the file.

        A value that this writer wrote counts more. Another writer, which has lost the run since,
        may have left a part with that step.
        """
        for record in _merged(list(_read_parts(self._run, names).values())):
            step = record["step"]
            with self._lock:
                known = json.loads(self._lines.get(step, b"{}"))
                own = {key: known[key] for key in self._written.get(step, ())}
                merged = known | record | own
                self._lines[step] = _line(merged)
                self._lines = dict(sorted(self._lines.items()))
                if self._last is not None and self._last["step"] == step:
                    self._last = merged

    def _extend(self, lines: dict[int, bytes]) -> None:
        """Append to the local file, or write it anew.

        It is written anew when it has one of these steps already. So it is when an earlier attempt
        failed, because then nobody knows how the file ends.
        """
        if not lines:
            return
        path = files.local_path(self._url)
        gone = self._end >= 0 and not os.path.exists(path)  # somebody moved it away
        append, self._end = min(lines) > self._end and not gone, math.inf
        if append:
            local_files.append(path, b"".join(lines[step] for step in sorted(lines)))
            self._end = max(lines)
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        """Write all lines to metrics.jsonl anew."""
        with self._lock:
            whole, end = b"".join(self._lines.values()), max(self._lines, default=-1)
        files.write(self._url, whole)
        self._end = end

    @contextmanager
    def _taken(self) -> Iterator[dict[int, bytes]]:
        """Yield the pending lines by step. They become pending again when the block raises."""
        with self._lock:
            taken, self._pending = self._pending, {}
        try:
            yield taken
        except BaseException:
            with self._lock:
                self._pending = taken | self._pending
            raise

    def _drop_parts(self, names: list[str]) -> None:
        """Remove the parts `names`, whose lines are in metrics.jsonl. Raises OSError.

        A part that was added since then is not in `names`, and stays for the next time. A part that
        the store refuses to remove is emptied. Otherwise its lines would bring dropped steps back.
        """

        told: list[str] = []  # appended to by several threads

        def drop(name: str) -> None:
            url = files.join(self._run, PARTS, name)
            if not files.discard(url, self._run, told.append):
                files.write(url, b"")
                self._emptied.add(name)

        run_in_threads(drop, names, _REQUESTS)
        for text in dict.fromkeys(told):
            self._report(text)
        self._loose = 0


def pause(objects: int) -> float:
    """Return the seconds between two flushes to a store that has N = `objects` of the log.

    The pause is N²/10, but at least 30. So a young log is up to date, and five days of logging make
    about 240 objects, however often the run is restarted. One object every 30 s would make 14,000,
    and a reader has to request each one. Nothing is lost by waiting: the log is flushed before each
    checkpoint, and a resumed run logs the steps after the checkpoint again.
    """
    return max(30, objects**2 / 10)


def _line(record: Record) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _contents(run: str, tail: int | None = None) -> tuple[bytes, dict[str, bytes]]:
    """Return the content of metrics.jsonl, and those of the parts by name.

    The content of a file that does not exist is empty.
    """
    parts = _read_parts(run, _parts(run))
    # metrics.jsonl is read last: if a part was removed meanwhile, its lines are in metrics.jsonl.
    url = files.join(run, JSONL)
    return _read_if_there(url) if tail is None else _read_end(url, tail), parts


def _parts(run: str) -> list[str]:
    names = files.list_names(files.join(run, PARTS))
    found = [name for name in names if re.fullmatch(r"\d{8,18}-\d{6}-\w+\.jsonl", name)]
    return sorted(found, key=lambda name: (int(name.partition("-")[0]), name))


def _read_parts(run: str, names: Iterable[str]) -> dict[str, bytes]:
    names = list(names)
    urls = [files.join(run, PARTS, name) for name in names]
    return dict(zip(names, run_in_threads(_read_if_there, urls, _REQUESTS), strict=True))


def _read_if_there(url: str) -> bytes:
    try:
        return files.read(url)
    except FileNotFoundError:
        return b""


def _read_end(url: str, tail: int) -> bytes:
    """Read about the last `tail` bytes of a file that only grows, and then whole lines alone."""
    size = files.size(url)
    return files.read(url, max(0, size - tail), size).partition(b"\n")[2]


def _merged(contents: list[bytes], report: Callable[[str], None] | None = None) -> list[Record]:
    """Merge lines into one record for each step, in the order of the steps.

    When two lines have the same key, the later one counts. Keys are added and never dropped,
    because either metrics.jsonl or a part may be the newer one.
    """
    found: dict[int, Record] = {}
    damaged = 0
    for content in contents:
        lines = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            if (record := _parse(line)) is not None:
                step = record["step"]
                found[step] = found.get(step, {}) | record
            elif line.strip() and number < len(lines):  # a kill may cut off the last one
                damaged += 1
    if damaged and report is not None:
        lines_are = (
            "line that cannot be read is" if damaged == 1 else "lines that cannot be read are"
        )
        report(f"{JSONL}: {damaged:,} {lines_are} left out")
    return [found[step] for step in sorted(found)]


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if _is_record(record) else None


def _is_record(value: Any) -> bool:
    """Return whether a line has a step, values that are no lists or objects, and numbers."""
    return (
        type(value) is dict
        and type(value.get("step")) is int
        and 0 <= value["step"] < 2**62
        and all(type(one) in _PLAIN for one in value.values())
        and all(type(value.get(name)) is not str for name in _NUMBERS)
    )
