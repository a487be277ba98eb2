"""Write, verify and read the files of torch's distributed checkpoints at a URL, in parallel."""

import contextlib
import io
import itertools
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

from engine.state import dcp_metadata
from engine.state.dcp_metadata import Place
from engine.state.torch_files import TorchFile
from shards.errors import InputError
from shards.storage import files
from shards.storage.upload import open_writer
from shards.threads import map_ahead

SPAN = 32 << 20  # bytes read by one request at most
PARALLEL = 4  # requests at once; with the span in use this takes 160 MiB of memory
GAP = 1 << 20  # tensors at most this many bytes apart are read together

Sums = dict[str, tuple[int, int]]  # name of a file: length in bytes, CRC32


class Writer(FileSystemWriter):
    """Write a checkpoint's files to the folder `url`: one for each process, and `.metadata`.

    `sums` holds the length and CRC32 of each file that this process wrote. Earlier files of the
    same names are overwritten.
    """

    def __init__(self, url: str) -> None:
        # A training copies its state to the CPU before it is written, so there is nothing to copy
        # ahead. Others (--debug-step, evaluations) write from the device, where time matters less.
        super().__init__(url, sync_files=False, per_thread_copy_ahead=0)
        system = _Files()
        self.fs = system  # type: ignore[assignment]
        self.path, self.sums = url, system.sums

    @property
    def checkpoint_id(self) -> str:
        """Return the URL that torch writes into `.metadata`, without credentials."""
        return files.redact(str(self.path))


class _Files(FileSystemBase):
    """The writer's file system. Its streams compute length and CRC32 while they write."""

    def __init__(self) -> None:
        self.sums: Sums = {}
        self._unnamed: dict[str, bytes] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:  # noqa: ARG002
        if path.endswith(".tmp"):  # kept for `rename`, because object stores rename nothing
            buffer = io.BytesIO()
            yield buffer
            self._unnamed[path] = buffer.getvalue()
            return
        with open_writer(path) as stream:
            yield stream
        self.sums[path.rsplit("/", 1)[-1]] = (stream.length, stream.crc)

    def rename(self, path: Any, new_path: Any) -> None:
        with self.create_stream(new_path, "wb") as stream:
            stream.write(self._unnamed.pop(path))

    def concat_path(self, path: Any, suffix: str) -> str:
        return files.join(path, suffix)

    def init_path(self, path: Any) -> str:
        return str(path)

    def mkdir(self, path: Any) -> None:
        """Do nothing, because a stream makes the folders that it needs."""

    def exists(self, path: Any) -> bool:  # noqa: ARG002
        """Return False. torch asks only to remove an old file, which a stream replaces anyway."""
        return False

    def rm_file(self, path: Any) -> None:
        """Do nothing. torch does not call this, because `exists` returns False."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str)


def verify_file(url: str, length: int, crc: int) -> None:
    """Check a file's length in bytes and CRC32.

    Raises InputError when it is missing or damaged, and OSError when the store does not answer.
    """
    folder, _, name = files.redact(url).rpartition("/")
    try:
        if files.size(url) == length:
            for _ in range(2):  # bytes damaged on their way here are right the second time
                found = 0
                for content in _fetch(_pieces(url, 0, length)):
                    found = zlib.crc32(content, found)
                if found == crc:
                    return
    except FileNotFoundError:
        raise InputError(f"{folder}: {name} is missing") from None
    raise InputError(f"{folder}: {name} is damaged, its length or CRC32 differs")


class Reader(StorageReader):
    """Read a checkpoint's tensors from the folder `url`, without running code in its files.

    `files` gives the length and CRC32 of each of the checkpoint's files. Methods raise InputError
    for content that no checkpoint of this engine has, and OSError when the store does not answer.
    """

    def __init__(self, url: str, files: Mapping[str, tuple[int, int]]) -> None:
        self._url, self._files = url, files
        self._places: dict[MetadataIndex, Place] = {}
        self._fault: InputError | OSError | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing, because nothing is kept from one load to the next."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the metadata, or empty metadata after an error.

        torch would lose the reason of an error that is raised here. So `set_up_storage_reader`,
        which torch calls next, raises it.
        """
        self._fault = None
        try:
            return self.metadata()
        except (InputError, OSError) as error:
            self._fault = error
            return Metadata({})

    def metadata(self) -> Metadata:
        """Read `.metadata`, which says what the checkpoint holds, and check it.

        Raises InputError when it is missing or damaged, and OSError when the store does not answer.
        """
        place = f"{files.redact(self._url)}: {dcp_metadata.NAME}"
        try:
            for _attempt in range(2):  # as in `verify_file`
                content = files.read(files.join(self._url, dcp_metadata.NAME))
                if self._files.get(dcp_metadata.NAME) == (len(content), zlib.crc32(content)):
                    return dcp_metadata.parse(content, self._files)
            raise InputError("is damaged, its length or CRC32 differs")
        except FileNotFoundError:
            raise InputError(f"{place} is missing") from None
        except InputError as error:
            raise InputError(f"{place} {error}") from None

    def set_up_storage_reader(self, metadata: Metadata, *_: Any, **__: Any) -> None:
        if self._fault:
            raise self._fault
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        for item in plan.items:
            if item.storage_index not in self._places:
                where = f"{files.redact(self._url)}: {dcp_metadata.NAME}"
                raise InputError(f"{where} is damaged: {item.storage_index.fqn} is in no file")
        spans = _spans((self._places[item.storage_index], item) for item in plan.items)
        pieces = (_pieces(files.join(self._url, s.file), s.start, s.stop) for s in spans)
        with contextlib.closing(_fetch(itertools.chain.from_iterable(pieces))) as fetched:
            for span in spans:
                count = len(range(span.start, span.stop, SPAN))
                content = b"".join(itertools.islice(fetched, count))
                for place, item in span.reads:
                    start = place.offset - span.start
                    self._fill(place, item, content[start : start + place.length], planner)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str)

    def _fill(self, place: Place, item: ReadItem, content: bytes, planner: LoadPlanner) -> None:
        """Copy the stored tensor, or the part that `item` asks for, to the planner's tensor."""
        try:
            tensor = _tensor(content)
        except Exception:  # it may have been damaged on its way here
            tensor = self._read_again(place)
        target = planner.resolve_tensor(item).detach()
        try:
            for dim, (offset, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                tensor = tensor.narrow(dim, offset, length)
        except (RuntimeError, IndexError):
            raise self._wrong(place, "a tensor of another shape") from None
        if target.size() != tensor.size():
            raise self._wrong(place, "a tensor of another shape")
        target.copy_(tensor)
        planner.commit_tensor(item, target)

    def _read_again(self, place: Place) -> Tensor:
        start, stop = place.offset, place.offset + place.length
        content = files.read(files.join(self._url, place.file), start, stop)
        try:
            return _tensor(content)
        except Exception:
            raise self._wrong(place, "no plain tensor") from None

    def _wrong(self, place: Place, what: str) -> InputError:
        where = f"{files.redact(self._url)}: {place.file} at byte {place.offset}"
        return InputError(f"{where} has {what}: the file is damaged or malicious")


def _tensor(content: bytes) -> Tensor:
    """Decode a tensor that torch.save wrote. Raises errors of any kind for anything else."""
    file = TorchFile(content)
    tensor = file.tensor(file.root)
    if tensor is None:
        raise TypeError("something else in place of a tensor")
    return tensor


class _Span(NamedTuple):
    """Bytes [start, stop) of a file, and the tensors to read from them."""

    file: str
    start: int
    stop: int
    reads: list[tuple[Place, ReadItem]]


def _spans(reads: Iterable[tuple[Place, ReadItem]]) -> list[_Span]:
    """Group neighboring tensors that are read together; only a single one may exceed SPAN."""
    spans: list[_Span] = []
    for place, item in sorted(reads, key=lambda read: read[0]):
        stop = place.offset + place.length
        last = spans[-1] if spans else _Span("", 0, 0, [])
        near = place.file == last.file and place.offset - last.stop <= GAP
        if near and (stop <= last.stop or stop - last.start <= SPAN):
            spans[-1] = last._replace(stop=max(stop, last.stop))
            last.reads.append((place, item))
        else:
            spans.append(_Span(place.file, place.offset, stop, [(place, item)]))
    return spans


def _pieces(url: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Split the bytes [start, stop) of an object into pieces of at most SPAN bytes."""
    for first in range(start, stop, SPAN):
        yield url, first, min(first + SPAN, stop)


def _fetch(pieces: Iterable[tuple[str, int, int]]) -> Generator[bytes, None, None]:
    """Yield the bytes [start, stop) of each URL, in order; threads read PARALLEL pieces ahead."""
    return map_ahead(lambda piece: files.read(*piece), pieces, PARALLEL, PARALLEL)
