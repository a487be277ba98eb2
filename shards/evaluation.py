"""Images for measuring: every sample once, in file order, one central crop each."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torchdata.nodes import IterableWrapper, ParallelMapper

from shards import storage
from shards.decode import DecodeError, center_box, crop_resize
from shards.errors import InputError
from shards.index import Index
from shards.reader import BlockReader, Faults, Fetches, StreamReader
from shards.tar import Block

CHUNK = 64  # samples that a decode thread takes at a time
LOCAL_AHEAD, REMOTE_AHEAD = 4, 16  # blocks (about 4 MB) fetched ahead of need


class EvalBatch(NamedTuple):
    """Consecutive samples."""

    images: Tensor  # [B, 3, S, S] uint8, channels last
    labels: Tensor  # [B] int64, -1 where there is none


class _Chunk(NamedTuple):
    block: Block
    first_id: int
    rows: range


def center_crops(
    index: Index,
    *,
    size: int,
    fraction: float,
    threads: int,
    corrupt: float,
    report: Callable[[str], None],
    limit: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[EvalBatch]:
    """The central square of `fraction` of each image's shorter side, at `size` pixels.

    With a `limit`, of evenly spaced blocks that hold about that many samples; of these, every n-th
    from the i-th on, where `part` is (i, n): what one of n processes measures. There is at least
    one batch, perhaps an empty one. Undecodable samples are left out and reported. Raises
    InputError when they are more than the fraction `corrupt` (and more than 10).
    """
    reader = BlockReader(index, report=report)
    faults = Faults(index.samples, corrupt, report)
    ahead = LOCAL_AHEAD if storage.is_local(index.url) else REMOTE_AHEAD

    def plan() -> Iterator[_Chunk | InputError]:
        places = _places(index, limit)[part[0] :: part[1]]
        with ThreadPoolExecutor(ahead, thread_name_prefix="fetch") as pool:
            blocks = StreamReader(iter(places), Fetches(reader, pool), ahead)
            try:
                for shard, number in places:
                    block = blocks.get(shard, number)
                    first_id = index.first_id(shard, number)
                    for start in range(0, len(block), CHUNK):
                        rows = range(start, min(start + CHUNK, len(block)))
                        yield _Chunk(block, first_id, rows)
            except InputError as error:
                yield error

    def load(chunk: _Chunk | InputError) -> EvalBatch | InputError:
        if isinstance(chunk, InputError):
            return chunk
        images, labels = [], []
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
        except InputError as error:
            return error
        stacked = torch.stack(images) if images else torch.empty((0, 3, size, size)).byte()
        return EvalBatch(stacked, torch.tensor(labels, dtype=torch.int64))

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
        yield EvalBatch(torch.empty((0, 3, size, size)).byte(), torch.empty(0, dtype=torch.int64))


def _places(index: Index, limit: int | None) -> list[tuple[int, int]]:
    """(shard, block) of all blocks, or of evenly spaced ones with about `limit` samples."""
    places = [(s, b) for s in range(len(index.shards)) for b in range(len(index.blocks(s)))]
    if limit is None or limit >= index.samples:
        return places
    keep = max(1, round(len(places) * limit / index.samples))
    return [places[i * len(places) // keep] for i in range(keep)]
