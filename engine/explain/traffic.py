"""Find what a run reads and writes: requests and bytes of an epoch and of its checkpoints."""

import math
from typing import NamedTuple

from engine.explain.plan import cadence, count_due
from engine.recipe import Recipe
from shards import index as indexes
from shards.cache import count_fitting
from shards.index import Index
from shards.order import Order
from shards.storage import files

DECODED = 346.0
"""Images that one core decodes in a second and cuts to two views of 224 pixels.

It was measured with ImageNet's JPEGs on one core of a server's CPU, by `launch/bench.py input`.
"""


class Reading(NamedTuple):
    """What all processes together read of data.train in an epoch."""

    images: int
    requests: int  # at most: streams that need the same block at the same time share it
    bytes: int
    kept_requests: int  # of these, what a full cache saves
    kept_bytes: int
    blocks: int  # of the data set
    exact: bool  # False when the sizes of the blocks are in files of their own, which are not read


class Saving(NamedTuple):
    """What a run writes to RUN/checkpoints."""

    written: int  # checkpoints until the end of the run
    kept: int  # checkpoints that stay at the end


def read_epoch(recipe: Recipe, order: Order) -> Reading:
    """Count the requests of the first epoch. Those of others differ a little."""
    index, images = order.index, order.steps_per_epoch * order.batch
    kept = count_kept(recipe, index)
    if any(shard.blocks is None for shard in index.shards):
        return _estimate(index, order.streams, images, kept)
    requests = size = kept_requests = kept_bytes = 0
    for stream in range(order.streams):
        for shard, block in order.epoch_blocks(0, stream):
            start, stop = index.block_range(shard, block)
            requests, size = requests + 1, size + stop - start
            if shard < kept:
                kept_requests, kept_bytes = kept_requests + 1, kept_bytes + stop - start
    blocks = sum(len(shard.blocks) for shard in index.shards if shard.blocks is not None)
    return Reading(images, requests, size, kept_requests, kept_bytes, blocks, exact=True)


def count_kept(recipe: Recipe, index: Index) -> int:
    """Return how many shards, the first ones, a full cache keeps. Local data is not kept."""
    if not recipe.data.cache or files.is_local(index.folder):
        return 0
    return count_fitting(index, recipe.data.cache_gb)


def _estimate(index: Index, streams: int, images: int, kept: int) -> Reading:
    """Estimate the reading from the sizes of the shards."""
    sizes = [shard.bytes for shard in index.shards]
    blocks = [-(-size // indexes.BLOCK_BYTES) for size in sizes]
    used = images / index.samples
    size, requests = sum(sizes), sum(blocks)
    twice = streams - 1  # blocks in which one stream ends and another one begins
    return Reading(
        images,
        round(requests * used) + twice,
        round(size * used) + twice * size // max(1, requests),
        round(sum(blocks[:kept]) * used),
        round(sum(sizes[:kept]) * used),
        sum(blocks),
        exact=False,
    )


def save_run(recipe: Recipe, total: int) -> Saving:
    """Count the checkpoints of a run of `total` steps."""
    config, every = recipe.checkpoint, cadence(recipe.checkpoint.every)
    written = count_due(every, total)
    kept = min(written, config.keep)
    keep = cadence(config.keep_every)
    if keep and every and every.denominator == keep.denominator == 1:
        last = int(every) * (written - kept)  # of those that go
        kept += last // math.lcm(int(every), int(keep))
    elif keep:
        older = range(1, written - kept + 1)
        kept += sum(math.ceil(number * every) % keep < 1 for number in older)
    return Saving(written, kept)
