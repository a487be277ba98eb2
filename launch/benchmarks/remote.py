"""Shards in an object store beside a copy of them on a local disk."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from unittest import mock

from shards import index as indexes
from shards.index import Index
from shards.loader import TrainLoader
from shards.order import Order
from shards.storage import files

MOST = 20_000  # images that bytes are counted over


def copy(index: Index, folder: str) -> Index:
    """The data set in a local folder."""
    names = [indexes.NAME, *(shard.name for shard in index.shards)]
    names += [indexes.sidecar(s.name) for s in index.shards if s.blocks is None]
    for name in names:
        files.write(f"{folder}/{name}", files.read(files.join(index.url, name)))
    return indexes.load(folder, "--data")


def fetched_share(order: Order, load: Callable[[Order], TrainLoader]) -> float:
    """Bytes fetched for an image, as a multiple of the data set's bytes for one.

    After one epoch, so that what is read ahead at the start stands against what is at the end.
    """
    steps = min(order.steps_per_epoch, max(1, MOST // order.batch))
    with closing(load(order)) as batches:
        for _ in range(steps):
            next(batches)
        with _counted() as fetched:
            for _ in range(steps):
                next(batches)
    total = sum(shard.bytes for shard in order.index.shards)
    return sum(fetched) / (steps * order.batch) * order.index.samples / total


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The bytes of each answer that a store gives meanwhile."""
    sizes, read = [], files.read

    def counted(url: str, start: int | None = None, stop: int | None = None) -> bytes:
        content = read(url, start, stop)
        sizes.append(len(content))
        return content

    with mock.patch.object(files, "read", counted):
        yield sizes
