"""Checkpoints at a URL: RUN/checkpoints/step_00000100/ with torch's distributed-checkpoint files.

A checkpoint exists when its commit.json does: written last, in one PUT, with the length and CRC32
of every file. Those are verified before anything is unpickled; a damaged checkpoint is reported
and the one before it is taken.
"""

import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from engine.world import World
from shards import storage
from shards.errors import InputError
from shards.fields import Operation

try:
    from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader, FsspecWriter
except ImportError:  # where older releases (2.11) have them
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

FORMAT = 2
FOLDER = "checkpoints"
COMMIT = "commit.json"


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and what it starts from."""

    every: Operation[int] = 1000
    """Steps between checkpoints. A process's last step is saved too; 0: only that."""
    keep: Operation[int] = 3
    """How many of the newest checkpoints stay."""
    resume: Operation[str] = ""
    """URL of another run, or of one of its checkpoints, whose full state a new run starts from."""


@dataclass(frozen=True)
class Commit:
    """What commit.json says: that the checkpoint is whole, and what run it belongs to."""

    url: str
    step: int
    method: dict[str, Any]  # the recipe's method fields, dotted names
    index_digest: str
    files: dict[str, tuple[int, int]]  # name: length in bytes, CRC32


def step_url(run: str, step: int) -> str:
    return storage.join(run, FOLDER, f"step_{step:08d}")


def save(
    run: str,
    step: int,
    state: dict[str, Any],
    method: dict[str, Any],
    index_digest: str,
    world: World,
) -> Commit:
    """Write `state`, nested dicts of tensors, as the checkpoint of `step`, and commit it.

    Every process writes what it holds; the first one commits when all have.
    """
    url = step_url(run, step)
    world.tell(lambda: storage.remove(url))  # what a process that was killed may have left there
    writer = FsspecWriter(url, sync_files=False)
    files = _CountingFiles(writer.fs)
    writer.fs = files  # type: ignore[assignment]
    with _one_process_is_fine(), _plain_errors(url, "written"):
        dcp_save(state, storage_writer=writer, no_dist=not world.distributed)
    sums = {name: entry for part in world.collect(files.sums) for name, entry in part.items()}

    def commit() -> Commit:
        packages = {name: version(name) for name in ("torch", "torchvision", "numpy")}
        document = {"format": FORMAT, "step": step, "method": method, "index_digest": index_digest}
        document |= {"packages": packages, "files": sums}
        storage.write(storage.join(url, COMMIT), json.dumps(document, indent=1).encode())
        return Commit(url, step, method, index_digest, sums)

    return world.tell(commit)


def load(commit: Commit, state: dict[str, Any], world: World) -> None:
    """Fill the tensors of `state` from a checkpoint that `latest` or `find` has verified."""
    with _one_process_is_fine(), _plain_errors(commit.url, "read"):
        dcp_load(state, storage_reader=FsspecReader(commit.url), no_dist=not world.distributed)


def latest(run: str, report: Callable[[str], None]) -> Commit | None:
    """The newest sound checkpoint of a run, None when it has none; damaged ones are reported."""
    for url in reversed(_steps(run)):
        try:
            return verify(url)
        except InputError as error:
            report(f"skipped: {error}")
    return None


def find(url: str, report: Callable[[str], None]) -> Commit:
    """The checkpoint at `url`, which is one, or a run whose newest is taken. Raises InputError."""
    if storage.exists(storage.join(url, COMMIT)):
        return verify(url)
    found = latest(url, report)
    if found is None:
        raise InputError(f"checkpoint.resume {storage.redact(url)}: no committed checkpoint there")
    return found


def verify(url: str) -> Commit:
    """Check a checkpoint's commit and the length and CRC32 of its files. Raises InputError."""
    place = storage.redact(url)
    try:
        document = json.loads(storage.read(storage.join(url, COMMIT)))
        files = {name: (length, crc) for name, (length, crc) in document["files"].items()}
        step, method = document["step"], document["method"]
        commit = Commit(url, step, method, document["index_digest"], files)
    except FileNotFoundError:
        raise InputError(f"{place}: not committed, its save was cut off") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{place}: {COMMIT} is damaged") from None
    if document.get("format") != FORMAT:
        raise InputError(f"{place}: format {document.get('format')}, not {FORMAT}")
    for name, (length, crc) in files.items():
        try:
            content = storage.read(storage.join(url, name))
        except FileNotFoundError:
            raise InputError(f"{place}: {name} is missing") from None
        if len(content) != length or zlib.crc32(content) != crc:
            raise InputError(f"{place}: {name} is damaged, its length or CRC32 differs")
    return commit


def prune(run: str, keep: int) -> None:
    """Remove all but the newest `keep` (at least 1) committed checkpoints, each commit first."""
    committed = [url for url in _steps(run) if storage.exists(storage.join(url, COMMIT))]
    for url in committed[:-keep]:
        storage.remove(storage.join(url, COMMIT))
        storage.remove(url)


def _steps(run: str) -> list[str]:
    """URLs of a run's checkpoints, whole or not, by step; what else lies there is not ours."""
    names = storage.list_names(storage.join(run, FOLDER))
    return [storage.join(run, FOLDER, name) for name in names if re.fullmatch(r"step_\d{8}", name)]


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Without torch's warning that there is no process group: there is none on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _plain_errors(url: str, what: str) -> Iterator[None]:
    """OSError in place of torch's CheckpointException, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        place = storage.redact(url)
        raise OSError(f"{place} could not be {what} by rank {rank}: {reason}") from None


class _CountingFiles(FileSystemBase):
    """The writer's file system, summing length and CRC32 of each file on the way to storage."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.sums: dict[str, tuple[int, int]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with self._inner.create_stream(path, mode) as stream:
            counted = _CountingStream(stream)
            yield counted
        self.sums[_name(path)] = (counted.length, counted.crc)

    def rename(self, path: Any, new_path: Any) -> None:
        self._inner.rename(path, new_path)
        self.sums[_name(new_path)] = self.sums.pop(_name(path))

    def concat_path(self, path: Any, suffix: str) -> Any:
        return self._inner.concat_path(path, suffix)

    def init_path(self, path: Any) -> Any:
        return self._inner.init_path(path)

    def mkdir(self, path: Any) -> None:
        self._inner.mkdir(path)

    def exists(self, path: Any) -> bool:
        return bool(self._inner.exists(path))

    def rm_file(self, path: Any) -> None:
        self._inner.rm_file(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str)


class _CountingStream:
    """A write stream that counts; everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.length = 0
        self.crc = 0

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self.length += len(view)
        self.crc = zlib.crc32(view, self.crc)
        self._stream.write(content)
        return len(view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _name(path: Any) -> str:
    return str(path).rsplit("/", 1)[-1]
