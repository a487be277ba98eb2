"""Choose how many threads decode images: the small ones are not worth more than one.

Python's lock lets one thread at a time run Python. Every call of torch lets it go, and then waits
for it. Where images are small, threads do little but wake each other up.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

from torchdata.nodes import BaseNode, IterableWrapper, ParallelMapper

from shards.index import Index

Item = TypeVar("Item")
Result = TypeVar("Result")

# What an image costs, in seconds of a core of 2021. Only the order of magnitude matters.
PYTHON = 60e-6  # all that does not depend on its size
BYTE = 11e-9  # decoding, for each byte of its file
PIXEL = 3e-9  # resizing, for each pixel that is made

# While others work on images of this cost, one thread more is worth it. For about half of this
# time an image has to hold the lock, and a lock that is busy more than half of the time is fought
# over: two threads then do no more than one.
COST_OF_A_THREAD = 80e-6


# Of images of 32 pixels, a process makes about 8,000 a second, and an H100 takes 11,000.
PROCESSES = 2


def count_useful(threads: int, index: Index, pixels: int) -> int:
    """Return how many of `threads` are worth starting, or 0 when the caller's thread is enough.

    Args:
        index: The data set. The mean bytes of its samples tell how large the images are.
        pixels: The number of pixels that are made of an image.
    """
    size = sum(shard.bytes for shard in index.shards) / max(1, index.samples)
    useful = int((PYTHON + BYTE * size + PIXEL * pixels) / COST_OF_A_THREAD)
    return 0 if useful <= 1 else min(threads, useful)


def count_processes(threads: int, index: Index, pixels: int, streams: int) -> int:
    """Return how many processes are worth starting beside a GPU, with `threads` threads in each.

    It is one where threads decode. Where each process works in a single thread, it is more. They
    share out the streams.
    """
    return 1 if count_useful(threads, index, pixels) else min(PROCESSES, threads, streams)


def map_in_threads(
    work: Callable[[Item], Result], items: Iterator[Item], threads: int
) -> BaseNode[Result]:
    """Map items in order, in so many threads; with 0 of them, in the thread that takes the results.

    Nothing begins before the first result is asked for.
    """
    mapped: BaseNode[Result] = ParallelMapper(
        IterableWrapper(items), work, num_workers=threads, method="thread", snapshot_frequency=0
    )
    return mapped
