"""Keep shards on a local disk once they were fetched.

Every epoch reads every shard once, in a different order. So the cache keeps a fixed part of the
data set, not the shards that were used last. fsspec's own `simplecache` is not used because it has
no size bound and writes the file that it reads: a second thread or process would see half a shard.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import numpy as np

from shards.digest import digest
from shards.errors import InputError
from shards.index import Index
from shards.storage import files
from shards.storage.space import is_full

GB = 1_000_000_000
STALE = 3600.0  # A half-written copy older than this many seconds belongs to a dead process.


class ShardCache:
    """A cache of the first shards of a data set, as many as fit a size bound.

    Each shard is fetched completely when it is first needed. Any number of threads and processes
    may share the folder.
    """

    def __init__(
        self, index: Index, folder: str, gigabytes: float, report: Callable[[str], None]
    ) -> None:
        """Open the cache, and create its folder if it is missing.

        When the disk is full, nothing more is kept, and that is reported. Raises InputError when
        `folder` is not local or can't be created.

        Args:
            gigabytes: The most that the cached shards may take, in units of 10**9 bytes.
            report: Takes a warning, in one line, when the disk fails.
        """
        if not files.is_local(folder):
            raise InputError(f"data.cache {files.redact(folder)}: must be a local folder")
        self._index, self._report, self._lock = index, report, Lock()
        self._kept = count_fitting(index, gigabytes)
        self._locks = [Lock() for _ in range(self._kept)]
        # Another data set has another folder, and so has this one when it is packed again.
        facts = json.dumps([index.folder, index.digest, index.plan])
        root = Path(files.local_path(folder))
        self._folder = root / digest(facts)
        self._full = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
        except OSError as error:
            if not is_full(error):
                raise InputError(
                    f"data.cache {folder}: {error.strerror}: give a folder that can be written to"
                ) from None
            self._give_up(error)

    def keeps(self, shard: int) -> bool:
        """Return whether the shard is one of those that fit."""
        return shard < self._kept

    def read(self, shard: int, start: int, stop: int) -> bytes:
        """Read the bytes [start, stop) of a shard. Raises what `files.read` raises."""
        url, size, path = self._place(shard)
        try:
            with self._locks[shard]:  # The first thread fetches the shard for all the others.
                if not (path.exists() and path.stat().st_size == size):
                    if self._full:
                        return files.read(url, start, stop)
                    files.download(url, size, str(path))
            with path.open("rb") as file:
                file.seek(start)
                content = file.read(stop - start)
        except OSError as error:
            if error.errno is None:  # The error comes from the store, not from the disk.
                raise
            self._give_up(error)
            return files.read(url, start, stop)
        return content if len(content) == stop - start else files.read(url, start, stop)

    def drop(self, shard: int) -> None:
        """Delete the local copy of a shard, which has turned out to be damaged."""
        with self._locks[shard]:
            self._place(shard)[2].unlink(missing_ok=True)

    def _place(self, shard: int) -> tuple[str, int, Path]:
        """Return a shard's URL, its size in bytes, and the path of its copy."""
        # The index's name for the shard is not used, because it could be `../../anything`.
        path = self._folder / f"shard-{shard:06d}.tar"
        return self._index.shard_url(shard), self._index.shards[shard].bytes, path

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            # A file that is missing was dropped by another process. The disk has not failed.
            if self._full or isinstance(error, FileNotFoundError):
                return
            self._full = True
        self._report(f"data.cache {self._folder}: {error.strerror}; no more shards are kept there")

    def _remove_stale(self) -> None:
        for path in self._folder.glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):  # Another process may delete it first.
                if path.stat().st_mtime < time.time() - STALE:
                    path.unlink()


def count_fitting(index: Index, gigabytes: float) -> int:
    """Return how many shards of a data set, the first ones, a cache of this size keeps."""
    ends = np.cumsum([shard.bytes for shard in index.shards])
    return int(np.searchsorted(ends, gigabytes * GB, side="right"))
