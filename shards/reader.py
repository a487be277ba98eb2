"""Fetch the blocks of a data set ahead of need."""

import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from weakref import WeakValueDictionary

from torch import Tensor

from shards.cache import ShardCache
from shards.decode import DEFAULT_RULES, PixelRules, decode
from shards.errors import InputError
from shards.index import Index
from shards.samples import Block
from shards.storage import files, retries
from shards.tar import TarError
from shards.threads import map_ahead


class DamagedBlock(InputError):
    """The bytes of a block are not what the index says."""


class BlockReader:
    """Fetches and parses blocks of one data set."""

    def __init__(
        self,
        index: Index,
        cache: ShardCache | None = None,
        report: Callable[[str], None] = lambda _: None,
        rules: PixelRules = DEFAULT_RULES,
    ) -> None:
        """Open a data set.

        Args:
            report: Takes one warning for each shard that arrived damaged at some time.
        """
        self.index, self.cache, self._report, self.rules = index, cache, report, rules
        self._reported: set[int] = set()
        self._lock = threading.Lock()

    def fetch(self, shard: int, block: int) -> Block:
        """Fetch a block.

        A block that arrives damaged from an object store is fetched again, a few times. If in the
        end only its CRC32 differs from the index's, this is reported and the block is used; its
        damaged images may still fail to decode later.

        Raises InputError naming the shard when the shard does not hold what the index says.
        """
        attempts = 1 if files.is_local(self.index.folder) else retries.CONTENT_ATTEMPTS
        for attempt in range(1, attempts + 1):
            try:
                return self._fetch(shard, block, last=attempt == attempts)
            except DamagedBlock as error:
                if attempt == attempts:
                    raise
                self._warn(shard, f"{error}; fetched again")
            if self.cache is not None and self.cache.keeps(shard):
                self.cache.drop(shard)
            retries.pause(attempt)
        raise AssertionError("unreachable")

    def _fetch(self, shard: int, block: int, last: bool) -> Block:
        start, stop = self.index.block_range(shard, block)
        samples = int(self.index.blocks(shard)[block, 1])
        url = files.redact(self.index.shard_url(shard))
        place = f"{url}: bytes {start} to {stop}"
        try:
            content = self._read(shard, start, stop)
            self._check_crc(content, shard, block, place, last)
            found = Block(content, self.index.layout, self.index.class_numbers)
        except FileNotFoundError:
            raise InputError(f"{url}: the shard is missing: restore it") from None
        except retries.WrongLength as error:
            raise InputError(f"{error}: the shard is truncated, restore it") from None
        except OSError as error:
            raise InputError(str(error)) from None
        except TarError as error:
            raise DamagedBlock(f"{place}: not the tar that the index describes: {error}") from None
        classes = len(self.index.classes)
        if classes and (wrong := [n for n in map(found.label, range(len(found))) if n >= classes]):
            raise DamagedBlock(
                f"{place}: label {wrong[0]}, but the index has {classes} classes; index the data "
                "set again"
            )
        if len(found) != samples:
            raise DamagedBlock(
                f"{place}: {len(found)} samples, the index says {samples}; index the data set again"
            )
        return found

    def _check_crc(self, content: bytes, shard: int, block: int, place: str, last: bool) -> None:
        crcs = self.index.shards[shard].crcs
        if crcs is None or zlib.crc32(content) == crcs[block]:
            return
        text = f"{place}: not what was packed, its CRC32 differs"
        if not last:
            raise DamagedBlock(text)
        self._warn(shard, f"{text}; restore the shard")

    def _read(self, shard: int, start: int, stop: int) -> bytes:
        if self.cache is not None and self.cache.keeps(shard):
            return self.cache.read(shard, start, stop)
        return files.read(self.index.shard_url(shard), start, stop)

    def _warn(self, shard: int, text: str) -> None:
        """Report a fault of a shard, unless one was reported before."""
        with self._lock:
            if shard in self._reported:
                return
            self._reported.add(shard)
        self._report(text)

    def decode(self, block: Block, row: int) -> Tensor:
        """Decode one sample's image to uint8 [3, H, W]. Raises DecodeError."""
        span = block.samples[row].image
        assert span is not None  # A Block keeps only samples with an image.
        return decode(block.content, *span, self.rules)

    def name_sample(self, block: Block, row: int, first_id: int) -> str:
        """Name a sample by its shard and its key; `first_id` is the id of the block's row 0."""
        return f"{self.url_of(first_id)}: {block.samples[row].key}"

    def url_of(self, sample_id: int) -> str:
        """Return the URL, without credentials, of the shard that has a sample."""
        return files.redact(self.index.shard_url(self.index.find_shard(sample_id)))


class StreamReader:
    """Fetches blocks in the order of need, `ahead` of them in addition to the one in use."""

    def __init__(
        self,
        blocks: Iterator[tuple[int, int]],
        fetches: "Fetches",
        ahead: int,
    ) -> None:
        self._blocks, self._fetches = blocks, fetches
        self._pending: deque[tuple[tuple[int, int], Future[Block]]] = deque()
        for _ in range(1 + ahead):
            self._submit()

    def get(self, shard: int, block: int) -> Block:
        """Return a block, which must be the one in use or a later one in the order.

        The blocks before it are dropped. Raises InputError when `BlockReader.fetch` does.
        """
        while self._pending[0][0] != (shard, block):
            self._pending.popleft()
            self._submit()
        return self._pending[0][1].result()

    def _submit(self) -> None:
        key = next(self._blocks, None)
        if key is not None:
            self._pending.append((key, self._fetches.submit(*key)))


class Fetches:
    """Fetches blocks in a pool of threads. Streams that need the same block at once share it."""

    def __init__(self, reader: BlockReader, pool: ThreadPoolExecutor) -> None:
        self._reader, self._pool = reader, pool
        self._known: WeakValueDictionary[tuple[int, int], Future[Block]] = WeakValueDictionary()

    def submit(self, shard: int, block: int) -> Future[Block]:
        """Return the future of a block. Start to fetch it, unless it is in memory or under way.

        Two threads must not call this at the same time.
        """
        future = self._known.get((shard, block))
        if future is None:
            future = self._pool.submit(self._reader.fetch, shard, block)
            self._known[shard, block] = future
        return future


def read_blocks(
    reader: BlockReader, places: Sequence[tuple[int, int]], ahead: int
) -> Iterator[tuple[tuple[int, int], Block]]:
    """Yield each (shard, block) of `places` with its block, in that order.

    Raises InputError when `BlockReader.fetch` does.

    Args:
        ahead: Number of blocks that are fetched ahead.
    """
    with closing(map_ahead(lambda place: reader.fetch(*place), places, ahead, ahead)) as blocks:
        yield from zip(places, blocks, strict=True)
