"""Copy shards from an object store to a local disk, and count the bytes that loading fetches."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from unittest import mock

from shards import index as indexes
from shards.index import Index
from shards.loader import TrainLoader
from shards.order import Order
from shards.storage import files

MOST = 20_000  # largest number of images over which bytes are counted


def copy(index: Index, folder: str) -> Index:
    """Copy the data set to a local folder and return the copy's index."""
    names = [indexes.NAME, *(shard.name for shard in index.shards)]
    names += [indexes.sidecar(s.name) for s in index.shards if s.blocks is None]
    for name in names:
        files.write(f"{folder}/{name}", files.read(files.join(index.url, name)))
    return indexes.load(folder, "--data")


def fetched_share(order: Order, load: Callable[[Order], TrainLoader]) -> float:
    """Return the bytes fetched for an image, as a multiple of the data set's bytes for an image.

    The count goes over one epoch, or over about 20,000 images when an epoch has more. It begins
    after the same number of batches: blocks that were read ahead before it then balance those that
    are read ahead at its end.
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
    """List the bytes of each answer that the store gives meanwhile."""
    sizes, read = [], files.read

    def counted(url: str, start: int | None = None, stop: int | None = None) -> bytes:
        content = read(url, start, stop)
        sizes.append(len(content))
        return content

    with mock.patch.object(files, "read", counted):
        yield sizes
