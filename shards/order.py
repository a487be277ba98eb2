"""Say which samples make up a batch, as a function of (index, seed, streams, batch size, step).

An epoch permutes the shards, the blocks inside each shard and the samples inside each block, and
joins them to one sequence of N positions. Its first U = floor(N / B) * B positions are cut into C
equal ranges, the streams. Each stream gives its next B / C samples to every batch. So a batch
mixes C distant places of the data set, while each stream reads its blocks one after another.

Ranks divide the streams among themselves; they never decide what is in a batch. Nothing here keeps
state: the position of any stream at any step is computed. tests/golden/order.json freezes the
result.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from shards.errors import InputError
from shards.index import Index
from shards.philox import Domain, permutation

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class BatchConfig:
    """The global batch, which is all rows of all processes that make up one update."""

    size: Annotated[int, Interval(ge=2, le=2**31)] = 4096
    """Images in the global batch."""
    micro: Annotated[int, Interval(ge=1)] = 1
    """Number of equal parts in which a batch goes through the networks. Gradients are averaged over
    the parts, and norm statistics are those of a part."""


@dataclass(frozen=True)
class Segment:
    """Consecutive positions of a stream that lie in one block."""

    shard: int
    block: int
    rows: Ids  # [n] positions in the block, in the order of use
    ids: Ids  # [n] sample ids


class Order:
    """The order of one data set under a seed, for C streams and batches of B samples."""

    def __init__(self, index: Index, seed: int, streams: int, batch: int) -> None:
        """Set up the order.

        Raises InputError unless C divides B and the data set holds at least one batch.
        """
        if index.samples < batch:
            raise InputError(
                f"data.train has {index.samples} samples, fewer than batch.size {batch}: "
                "use a smaller --batch.size"
            )
        if streams < 1 or batch % streams:
            small = [c for c in range(1, math.isqrt(batch) + 1) if batch % c == 0]
            fit = [*small, *(batch // c for c in small)]
            near = min(fit, key=lambda c: (abs(c - streams), c))
            up = max(1, round(batch / max(1, streams))) * streams
            raise InputError(
                f"batch.size {batch} is not divisible by data.streams {streams}: "
                f"use --data.streams {near} or --batch.size {up}"
            )
        self.index, self.seed, self.streams, self.batch = index, seed, streams, batch
        self.steps_per_epoch = index.samples // batch
        self.rows = batch // streams  # Every stream gives this many rows to every batch.
        self._shards: dict[int, tuple[Ids, Ids]] = {}
        self._blocks: dict[tuple[int, int], tuple[Ids, Ids]] = {}
        self._samples: dict[tuple[int, int, int], Ids] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Send to another process what the order was made of, without what it keeps for itself."""
        return Order, (self.index, self.seed, self.streams, self.batch)

    def batch_segments(self, step: int, stream: int) -> list[Segment]:
        """List the B / C samples that `stream` gives to the batch of `step`, counted from 0."""
        epoch, k = divmod(step, self.steps_per_epoch)
        start = (stream * self.steps_per_epoch + k) * self.rows
        return list(self.segments(epoch, start, start + self.rows))

    def stream_blocks(self, step: int, stream: int) -> Iterator[tuple[int, int]]:
        """Yield, without end, each (shard, block) that `stream` needs from `step` on, in order."""
        epoch, k = divmod(step, self.steps_per_epoch)
        while True:
            yield from self.epoch_blocks(epoch, stream, k)
            epoch, k = epoch + 1, 0

    def epoch_blocks(self, epoch: int, stream: int, k: int = 0) -> Iterator[tuple[int, int]]:
        """Yield each (shard, block) that `stream` needs from batch k to the end of an epoch."""
        first = (stream * self.steps_per_epoch + k) * self.rows
        last = (stream + 1) * self.steps_per_epoch * self.rows
        for shard, block, _, _ in self._walk(epoch, first, last):
            yield shard, block

    def segments(self, epoch: int, start: int, stop: int) -> Iterator[Segment]:
        """Yield the positions [start, stop) of an epoch's sequence, block by block."""
        for shard, block, low, high in self._walk(epoch, start, stop):
            rows = self._sample_order(epoch, shard, block)[low:high]
            yield Segment(shard, block, rows, self.index.first_id(shard, block) + rows)

    def _walk(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (shard, block, low, high) for each block that overlaps [start, stop).

        [low, high) is the overlap, in positions of the permuted block.
        """
        shards, shard_ends = self._shard_order(epoch)
        i = int(np.searchsorted(shard_ends, start, side="right"))
        while start < stop:
            shard = int(shards[i])
            shard_start = int(shard_ends[i]) - self.index.shards[shard].samples
            blocks, block_ends = self._block_order(epoch, shard)
            # Only the blocks that overlap are listed, because a shard may have 100,000 of them.
            first = int(np.searchsorted(block_ends, start - shard_start, side="right"))
            last = int(np.searchsorted(block_ends, stop - shard_start, side="left"))
            near = slice(first, last + 1)
            for block, end in zip(blocks[near].tolist(), block_ends[near].tolist(), strict=True):
                block_start = shard_start + end - int(self.index.blocks(shard)[block, 1])
                high = min(stop, shard_start + end)
                yield shard, block, start - block_start, high - block_start
                start = high
            i += 1

    def _shard_order(self, epoch: int) -> tuple[Ids, Ids]:
        """Return the epoch's order of shards [S], and where each ends in the sequence [S]."""
        if epoch not in self._shards:
            shards = permutation(self.seed, Domain.SHARDS, np.arange(len(self.index.shards)), epoch)
            # All streams enter the next epoch together, so at most two epochs are in use.
            self._shards = {e: v for e, v in self._shards.items() if e == epoch - 1}
            self._shards[epoch] = shards, np.cumsum(np.diff(self.index.first_ids)[shards])
        return self._shards[epoch]

    def _block_order(self, epoch: int, shard: int) -> tuple[Ids, Ids]:
        """Return the epoch's order of a shard's blocks [K], and where each ends in it [K]."""
        key = (epoch, shard)
        if key not in self._blocks:
            samples = self.index.blocks(shard)[:, 1]
            # The first sample's id names a block, so the blocks before it need no counting.
            names = self.index.first_ids[shard] + np.cumsum(samples) - samples
            blocks = permutation(self.seed, Domain.BLOCKS, names, epoch)
            if len(self._blocks) > 2 * self.streams:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[key] = blocks, np.cumsum(samples[blocks])
        return self._blocks[key]

    def _sample_order(self, epoch: int, shard: int, block: int) -> Ids:
        """Return the epoch's order of a block's samples [n], which several batches take from."""
        key = (epoch, shard, block)
        if key not in self._samples:
            ids = self.index.first_id(shard, block) + np.arange(self.index.blocks(shard)[block, 1])
            if len(self._samples) > 2 * self.streams:
                self._samples.pop(next(iter(self._samples)))
            self._samples[key] = permutation(self.seed, Domain.SAMPLES, ids, epoch)
        return self._samples[key]


def rank_streams(streams: int, rank: int, world: int) -> range:
    """Return the streams that a rank reads.

    Raises InputError when there are more ranks than streams.
    """
    if world > streams:
        raise InputError(
            f"{world} processes but data.streams is {streams}: start at most {streams} processes"
        )
    return range(rank * streams // world, (rank + 1) * streams // world)
