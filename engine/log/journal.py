"""RUN/metrics.jsonl: one line for each logged step, on any storage.

A file on a local disk grows line by line. An object cannot grow. There, new lines go to parts that
never change, one PUT each: RUN/metrics/00000121-000004-3f9a2c51.jsonl has the step of its first
line, its number, its writer. Now and then `compact` writes RUN/metrics.jsonl whole, then removes
the parts. At any moment, and after any kill, both together are the log; what both have counts once.

Another process than the writer adds to a step, with what it measured of its checkpoint, by a part
too (`add`), on a local disk as well.
"""

import json
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from shards.storage import files

JSONL = "metrics.jsonl"
PARTS = "metrics"

Record = dict[str, Any]


def read(run: str) -> list[Record]:
    """The log of a run that ended, was killed or goes on: one record for each step, in order.

    Empty when there is none. Of a step that was written twice the later values count. Lines that
    are no record, half-written ones above all, are left out. Raises OSError.
    """
    content, parts = _contents(run)
    return _merged([content, *parts.values()])


def add(run: str, record: Record) -> None:
    """Add to a step's record from outside, while the run's writer goes on or when there is none.

    `read` has it at once, metrics.jsonl when the writer next compacts. Raises OSError.
    """
    name = f"{record['step']:08d}-{0:06d}-{secrets.token_hex(4)}.jsonl"
    files.write(files.join(run, PARTS, name), _line(record))


class Journal:
    """The log of a run, for its one writer. Opened at step `start`: later lines are dropped.

    `flush` and `compact` may run in other threads while `write` is called. After an OSError of
    theirs the lines are still there and go with the next call.
    """

    def __init__(self, run: str, start: int, report: Callable[[str], None] = print) -> None:
        """Cleans what an earlier writer left. Raises OSError.

        `report`: takes what a store refuses to remove.
        """
        self._run, self._url, self._report = run, files.join(run, JSONL), report
        self._local = files.is_local(run)
        found, parts = _contents(run)
        merged = _merged([found, *parts.values()])
        records = [record for record in merged if record["step"] <= start]
        self._lines = {record["step"]: _line(record) for record in records}
        self._last = records[-1] if records else None
        self._pending: dict[int, bytes] = {}
        self._lock = threading.Lock()  # of the three above; nobody waits for storage with it
        self._storing = threading.Lock()  # one at a time

        self._end: float = records[-1]["step"] if records else -1  # of a local file
        self._writer = secrets.token_hex(4)  # no name is used twice, not even by a restart
        self._parts = 0  # made by this writer
        self._loose = 0  # of them that are not compacted
        self._flushed = time.monotonic()
        whole = b"".join(self._lines.values())
        if whole != found or (self._local and not files.exists(self._url)):
            files.write(self._url, whole)
        self._emptied: set[str] = set()  # parts that the store refuses to remove
        self._drop_parts([name for name, content in parts.items() if content])
        self._emptied |= {name for name, content in parts.items() if not content}

    @property
    def last(self) -> Record | None:
        """The newest record."""
        return self._last

    @property
    def due(self) -> bool:
        """Whether it is time for a flush."""
        return time.monotonic() - self._flushed >= pause(self._loose)

    @property
    def unwritten(self) -> int:
        """How many lines are in memory only."""
        return len(self._pending)

    def after(self, step: int) -> list[Record]:
        """The records of later steps."""
        return [json.loads(line) for known, line in self._lines.items() if known > step]

    def write(self, record: Record) -> None:
        """Note a step's record, in memory. A second one of the same step adds to the first."""
        step = record["step"]
        with self._lock:
            if self._last is not None and self._last["step"] == step:
                record = self._last | record
            self._last = record
            self._lines[step] = self._pending[step] = _line(record)

    def flush(self) -> None:
        """Put what was noted since the last time in storage. Raises OSError."""
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
        """Put everything in metrics.jsonl, then remove the parts. Raises OSError.

        That is 10 MB late in the longest recipe: little beside a checkpoint, much for every line.
        """
        with self._storing:
            parts = [name for name in _parts(self._run) if name not in self._emptied]
            self._take_in(name for name in parts if self._writer not in name)
            with self._taken() as lines:
                if self._local and not parts:
                    self._extend(lines)
                elif lines or parts:
                    whole, end = self._whole()
                    files.write(self._url, whole)
                    self._end = end
            self._drop_parts(parts)

    def _take_in(self, names: Iterable[str]) -> None:
        """What others have added; of a step that they and the writer tell of, its values win."""
        for record in _merged(list(_read_parts(self._run, names).values())):
            step = record["step"]
            with self._lock:
                known = json.loads(self._lines.get(step, b"{}"))
                self._lines[step] = _line(record | known)
                self._lines = dict(sorted(self._lines.items()))
                if self._last is not None and self._last["step"] == step:
                    self._last = record | self._last

    def _extend(self, lines: dict[int, bytes]) -> None:
        """Append to the local file; replace it where it ends in one of the steps, or who knows."""
        if not lines:
            return
        append, self._end = min(lines) > self._end, math.inf
        if append:
            with open(files.open_filesystem(self._url)[1], "ab") as file:
                file.write(b"".join(lines.values()))
            self._end = max(lines)
        else:
            whole, end = self._whole()
            files.write(self._url, whole)
            self._end = end

    def _whole(self) -> tuple[bytes, int]:
        """All lines, and the last one's step."""
        with self._lock:
            return b"".join(self._lines.values()), max(self._lines)

    @contextmanager
    def _taken(self) -> Iterator[dict[int, bytes]]:
        """The pending lines by step; they are pending again when they cannot be written."""
        with self._lock:
            taken, self._pending = self._pending, {}
        try:
            yield taken
        except BaseException:
            with self._lock:
                self._pending = taken | self._pending
            raise

    def _drop_parts(self, names: list[str]) -> None:
        """Remove those that are in metrics.jsonl; one that was added since stays for the next time.

        A part that stayed with what it says would bring dropped steps back.
        """

        told: list[str] = []  # in several threads at once

        def drop(name: str) -> None:
            url = files.join(self._run, PARTS, name)
            if not files.discard(url, self._run, told.append):
                files.write(url, b"")
                self._emptied.add(name)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(drop, names))
        for text in dict.fromkeys(told):
            self._report(text)
        self._loose = 0


def pause(files: int) -> float:
    """Seconds from one flush to the next on an object store, where `files` objects have piled up.

    N²/10, at least 30: a log is fresh while it is young, and five days of it are about 240 objects,
    however often a run is restarted. One each 30 s would be 14,000, and a reader asks for each.
    Nothing is lost by it: what is logged before a checkpoint is flushed with it, the rest comes
    again.
    """
    return max(30, files**2 / 10)


def _line(record: Record) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _contents(run: str) -> tuple[bytes, dict[str, bytes]]:
    """What metrics.jsonl holds, and the parts by name; nothing where there is none."""
    parts = _read_parts(run, _parts(run))
    # metrics.jsonl last: a part that was removed meanwhile is in it.
    return _read_if_there(files.join(run, JSONL)), parts


def _parts(run: str) -> list[str]:
    names = files.list_names(files.join(run, PARTS))
    return [name for name in names if re.fullmatch(r"\d{8}-\d{6}-\w+\.jsonl", name)]


def _read_parts(run: str, names: Iterable[str]) -> dict[str, bytes]:
    names = list(names)
    urls = [files.join(run, PARTS, name) for name in names]
    with ThreadPoolExecutor(8) as threads:  # a store takes its time for each
        return dict(zip(names, threads.map(_read_if_there, urls), strict=True))


def _read_if_there(url: str) -> bytes:
    try:
        return files.read(url)
    except FileNotFoundError:
        return b""


def _merged(contents: list[bytes]) -> list[Record]:
    """One record for each step, in order of steps, later values winning.

    Of a part and a whole that covers it either may be the newer: so keys are added, never dropped.
    """
    found: dict[int, Record] = {}
    for line in b"\n".join(contents).split(b"\n"):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(record, dict) and type(step) is int and step >= 0:
            found[step] = found.get(step, {}) | record
    return [found[step] for step in sorted(found)]
