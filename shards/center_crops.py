"""Images for measuring: every sample once, in file order, one central crop each."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchdata.nodes import IterableWrapper, ParallelMapper

from shards.decode import DecodeError, center_box, crop_resize
from shards.errors import InputError
from shards.index import Index
from shards.reader import BlockReader, Faults, Fetches, StreamReader
from shards.storage import files
from shards.tar import Block

CHUNK = 64  # samples that a decode thread takes at a time
LOCAL_AHEAD, REMOTE_AHEAD = 4, 16  # blocks (about 4 MB) fetched ahead of need


class EvalBatch(NamedTuple):
    """Consecutive samples."""

    images: Tensor  # [B, 3, S, S] uint8, channels last
    labels: Tensor  # [B] int64, -1 where there is none
    ids: Tensor  # [B] int64


class _Chunk(NamedTuple):
    block: Block
    first_id: int
    rows: list[int]


def center_crops(
    index: Index,
    *,
    size: int,
    fraction: float,
    threads: int,
    corrupt: float,
    report: Callable[[str], None],
    limit: int | None = None,
    ids: NDArray[np.int64] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Generator[EvalBatch, None, None]:
    """The central square of `fraction` of each image's shorter side, at `size` pixels.

    With a `limit`, of evenly spaced blocks that hold about that many samples; with `ids` [n], in
    rising order, of these samples only. Of all blocks every n-th from the i-th on, where `part` is
    (i, n): what one of n processes measures. There is at least one batch, perhaps an empty one.
    Undecodable samples are left out and reported. Raises InputError when they are more than the
    fraction `corrupt` (and more than 10).
    """
    reader = BlockReader(index, report=report)
    faults = Faults(index.samples, corrupt, report)
    ahead = LOCAL_AHEAD if files.is_local(index.url) else REMOTE_AHEAD

    def plan() -> Iterator[_Chunk | InputError]:
        places = _places(index, limit, ids)[part[0] :: part[1]]
        with ThreadPoolExecutor(ahead, thread_name_prefix="fetch") as pool:
            blocks = StreamReader(iter(places), Fetches(reader, pool), ahead)
            try:
                for shard, number in places:
                    block = blocks.get(shard, number)
                    first_id = index.first_id(shard, number)
                    rows = list(range(len(block)))
                    if ids is not None:
                        first, last = np.searchsorted(ids, (first_id, first_id + len(block)))
                        rows = (ids[first:last] - first_id).tolist()
                    for start in range(0, len(rows), CHUNK):
                        yield _Chunk(block, first_id, rows[start : start + CHUNK])
            except InputError as error:
                yield error

    def load(chunk: _Chunk | InputError) -> EvalBatch | InputError:
        if isinstance(chunk, InputError):
            return chunk
        images, labels, found = [], [], []
        try:
            for row in chunk.rows:
                try:
                    image = reader.decode(chunk.block, row)
                except DecodeError as error:
                    reader.record(faults, chunk.block, chunk.first_id, row, error)
                    continue
                box = center_box(image.shape[1], image.shape[2], fraction)
                images.append(crop_resize(image, box, size))
                labels.append(chunk.block.label(row))
                found.append(chunk.first_id + row)
        except InputError as error:
            return error
        stacked = torch.stack(images) if images else torch.empty((0, 3, size, size)).byte()
        return EvalBatch(stacked, *(torch.tensor(x, dtype=torch.int64) for x in (labels, found)))

    decoded = ParallelMapper(
        IterableWrapper(plan()), load, num_workers=threads, method="thread", snapshot_frequency=0
    )
    empty = True
    for batch in decoded:
        if isinstance(batch, InputError):
            raise batch
        yield batch
        empty = False
    if empty:
        nothing = torch.empty(0, dtype=torch.int64)
        yield EvalBatch(torch.empty((0, 3, size, size)).byte(), nothing, nothing)


def _places(
    index: Index, limit: int | None, ids: NDArray[np.int64] | None
) -> list[tuple[int, int]]:
    """(shard, block) of all blocks, of evenly spaced ones with about `limit` samples, or of those
    that hold one of `ids`."""
    places = [(s, b) for s in range(len(index.shards)) for b in range(len(index.blocks(s)))]
    if ids is not None:
        counts = np.concatenate([index.blocks(s)[:, 1] for s in range(len(index.shards))])
        ends = np.cumsum(counts)
        held = np.searchsorted(ids, ends) - np.searchsorted(ids, ends - counts)
        places = [place for place, n in zip(places, held.tolist(), strict=True) if n]
    if limit is None or limit >= index.samples:
        return places
    keep = max(1, round(len(places) * limit / index.samples))
    return [places[i * len(places) // keep] for i in range(keep)]
