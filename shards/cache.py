"""Shards on a local disk, kept once they were fetched.

Every epoch reads every shard once, in another order, so a fixed part of the data set is kept, not
the shards that were used last. fsspec's own `simplecache` has no bound, and writes where it reads:
a second thread or process would see half a shard.
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

GB = 1_000_000_000
STALE = 3600.0  # seconds after which a half-written copy is a dead process's


class ShardCache:
    """The first shards of a data set that fit a bound, each fetched whole when it is first needed.

    Any number of threads and processes may share the folder.
    """

    def __init__(
        self, index: Index, folder: str, gigabytes: float, report: Callable[[str], None]
    ) -> None:
        """Raises InputError when `folder` is not local or can't be made."""
        if not files.is_local(folder):
            raise InputError(f"data.cache {files.redact(folder)}: must be a local folder")
        ends = np.cumsum([shard.bytes for shard in index.shards])
        self._index, self._report, self._lock = index, report, Lock()
        self._kept = int(np.searchsorted(ends, gigabytes * GB, side="right"))
        self._locks = [Lock() for _ in range(self._kept)]
        # Another data set, or this one packed anew, has another folder.
        facts = json.dumps([index.url, index.digest, index.plan])
        root = Path(files.open_filesystem(folder)[1])
        self._folder = root / digest(facts)
        self._full = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
        except OSError as error:
            raise InputError(f"data.cache {folder}: {error.strerror}") from None

    def keeps(self, shard: int) -> bool:
        """Whether the shard is one of those that fit."""
        return shard < self._kept

    def read(self, shard: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard. Raises as `files.read`."""
        url, size, path = self._place(shard)
        try:
            with self._locks[shard]:  # one block's thread fetches the shard, for the others too
                if not (path.exists() and path.stat().st_size == size):
                    if self._full:
                        return files.read(url, start, stop)
                    files.download(url, size, str(path))
            with path.open("rb") as file:
                file.seek(start)
                content = file.read(stop - start)
        except OSError as error:
            if error.errno is None:  # the store's, not the disk's
                raise
            self._give_up(error)
            return files.read(url, start, stop)
        return content if len(content) == stop - start else files.read(url, start, stop)

    def drop(self, shard: int) -> None:
        """Forget a copy that turned out damaged."""
        with self._locks[shard]:
            self._place(shard)[2].unlink(missing_ok=True)

    def _place(self, shard: int) -> tuple[str, int, Path]:
        """A shard's URL, bytes, and where its copy is."""
        path = self._folder / f"shard-{shard:06d}.tar"  # an index may name it ../../anything
        return self._index.shard_url(shard), self._index.shards[shard].bytes, path

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            if self._full or isinstance(error, FileNotFoundError):  # dropped by another process
                return
            self._full = True
        self._report(f"data.cache {self._folder}: {error.strerror}; no more shards are kept there")

    def _remove_stale(self) -> None:
        for path in self._folder.glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if path.stat().st_mtime < time.time() - STALE:
                    path.unlink()
