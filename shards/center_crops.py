"""Read images for evaluation: every sample once, in file order, as one central crop."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchdata.nodes import Prefetcher

from shards.corrupt import Faults
from shards.decode import (
    DEFAULT_RULES,
    DecodeError,
    PixelRules,
    center_box,
    crop_into,
    decode_together,
)
from shards.decode_threads import count_useful, map_in_threads
from shards.errors import InputError
from shards.index import Index
from shards.reader import BlockReader, read_blocks
from shards.samples import Block
from shards.storage import files

CHUNK = 64  # A decode thread takes this many samples at a time.
BATCHES_AHEAD = 2
LOCAL_AHEAD, REMOTE_AHEAD = 4, 16  # This many blocks (about 4 MB each) are fetched ahead.


class EvalBatch(NamedTuple):
    """A batch of samples in file order."""

    images: Tensor  # [B, 3, S, S] uint8
    labels: Tensor  # [B] int64, -1 where there is none
    ids: Tensor  # [B] int64


class _Chunk(NamedTuple):
    block: Block
    first_id: int
    rows: list[int]


@dataclass(frozen=True)
class CropReader:
    """Reads data sets for evaluation. Each image's central square is resized to one size.

    Samples that can't be decoded are left out and reported.
    """

    size: int
    """Side of a crop, in pixels."""
    fraction: float
    """Side of the square, as a fraction of the image's shorter side."""
    threads: int
    corrupt: float
    """Fraction of the samples that may be undecodable. 10 samples always may."""
    report: Callable[[str], None]
    part: tuple[int, int] = (0, 1)
    """(i, n) reads every n-th block from the i-th on: what one of n processes measures."""
    rules: PixelRules = DEFAULT_RULES
    """How image files become pixels."""

    def read(
        self, index: Index, *, limit: int | None = None, ids: NDArray[np.int64] | None = None
    ) -> Generator[EvalBatch, None, None]:
        """Yield the crops in file order. There is at least one batch, which may be empty.

        Raises InputError when too many samples can't be decoded, or when a block can't be read.

        Args:
            limit: Read only evenly spaced blocks that hold about this many samples.
            ids: [n] Read only the samples with these ids, which are in rising order.
        """
        reader = BlockReader(index, report=self.report, rules=self.rules)
        faults = Faults(index.samples, self.corrupt, self.report)
        threads = count_useful(self.threads, index, self.size**2)
        plan = self._plan(reader, limit, ids)
        decoded = map_in_threads(partial(self._load, reader, faults), plan, threads)
        empty = True
        for batch in Prefetcher(decoded, prefetch_factor=BATCHES_AHEAD, snapshot_frequency=0):
            if isinstance(batch, InputError):
                # A thread still holds this error. With a traceback it would hold the threads, too.
                raise InputError(str(batch))
            yield batch
            empty = False
        if empty:
            nothing = torch.empty(0, dtype=torch.int64)
            yield EvalBatch(self._allocate(0).contiguous(), nothing, nothing)

    def _plan(
        self, reader: BlockReader, limit: int | None, ids: NDArray[np.int64] | None
    ) -> Iterator[_Chunk | InputError]:
        index, (first_part, parts) = reader.index, self.part
        ahead = LOCAL_AHEAD if files.is_local(index.folder) else REMOTE_AHEAD
        try:  # torchdata would make a traceback of an error that is raised here
            places = index.places(_choose_blocks(index, limit, ids)[first_part::parts])
            for (shard, number), block in read_blocks(reader, places, ahead):
                first_id = index.first_id(shard, number)
                rows = list(range(len(block)))
                if ids is not None:
                    first, last = np.searchsorted(ids, (first_id, first_id + len(block)))
                    rows = (ids[first:last] - first_id).tolist()
                for start in range(0, len(rows), CHUNK):
                    yield _Chunk(block, first_id, rows[start : start + CHUNK])
        except InputError as error:
            yield InputError(str(error))

    def _load(
        self, reader: BlockReader, faults: Faults, chunk: _Chunk | InputError
    ) -> EvalBatch | InputError:
        if isinstance(chunk, InputError):
            return chunk
        out = self._allocate(len(chunk.rows))
        try:
            rows = self._cut(reader, faults, chunk, out)
        except InputError as error:
            return error
        labels = torch.tensor([chunk.block.label(row) for row in rows], dtype=torch.int64)
        ids = torch.tensor(rows, dtype=torch.int64) + chunk.first_id
        return EvalBatch(out[: len(rows)].contiguous(), labels, ids)

    @torch.inference_mode()  # It makes each call of torch cheaper.
    def _cut(self, reader: BlockReader, faults: Faults, chunk: _Chunk, out: Tensor) -> list[int]:
        """Cut the crops of a chunk into `out`, one after another, and return their rows."""
        rows: list[int] = []
        for group in decode_together(self._decode(reader, faults, chunk)):
            for image, row in group:
                box = center_box(image.shape[1], image.shape[2], self.fraction)
                crop_into(out[len(rows) : len(rows) + 1], image, box)
                rows.append(row)
        return rows

    def _decode(
        self, reader: BlockReader, faults: Faults, chunk: _Chunk
    ) -> Iterator[tuple[Tensor, int]]:
        """Yield the images of a chunk that can be decoded, with their rows; count the others."""
        for row in chunk.rows:
            try:
                yield reader.decode(chunk.block, row), row
            except DecodeError as error:
                name = reader.name_sample(chunk.block, row, chunk.first_id)
                faults.record(chunk.first_id + row, name, error)

    def _allocate(self, count: int) -> Tensor:
        """Return memory [n, 3, S, S], channels last, which is laid out as `crop_into` asks."""
        shape = (count, self.size, self.size, 3)
        return torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)


def _choose_blocks(
    index: Index, limit: int | None, ids: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Return the numbers of the blocks to read, counted in file order.

    `ids` keeps the blocks that hold one of these samples. `limit` keeps evenly spaced blocks with
    about that many samples. Without them, all blocks are read.
    """
    if ids is None:
        numbers = np.arange(index.block_counts.sum())
    else:
        numbers = np.flatnonzero(np.diff(np.searchsorted(ids, index.block_ends()), prepend=0))
    if limit is None or limit >= index.samples:
        return numbers
    keep = max(1, round(len(numbers) * limit / index.samples))
    return numbers[np.arange(keep) * len(numbers) // keep]
