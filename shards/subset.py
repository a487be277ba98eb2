"""A part of a data set as one of its own: as many images of each class, or those of a list.

The choice is a pure function of the data set, the fraction and the seed. The images are copied to
new shards once, so that learning from 1% of them does not read the other 99% at every epoch.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards import storage
from shards.errors import InputError
from shards.index import Index
from shards.pack import Image, ImageSet, plan_shards, write_shards
from shards.philox import Domain, permutation
from shards.reader import BlockReader, Fetches, StreamReader
from shards.tar import Block

AHEAD = 16  # blocks fetched ahead of need
SHARD_BYTES = 64_000_000


class Places(NamedTuple):
    """Where the images of some samples are."""

    ids: NDArray[np.int64]  # [n] sample ids, rising
    labels: NDArray[np.int64]  # [n] -1 where there is none
    spans: NDArray[np.int64]  # [n, 3] shard, byte offset in it, bytes
    names: list[str]  # [n] key and extension: n01440764_10026.jpg

    def take(self, which: NDArray[np.int64]) -> "Places":
        """Those at the positions `which` [m]."""
        names = [self.names[i] for i in which.tolist()]
        return Places(self.ids[which], self.labels[which], self.spans[which], names)

    @staticmethod
    def join(parts: "Sequence[Places]") -> "Places":
        """Those of all processes, by rising id."""
        whole = Places(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.spans for part in parts]),
            [name for part in parts for name in part.names],
        )
        return whole.take(np.argsort(whole.ids, kind="stable"))


def find_places(index: Index, part: tuple[int, int], report: Callable[[str], None]) -> Places:
    """Read a data set once, every n-th block from the i-th on where `part` is (i, n).

    Raises InputError when a shard is not what the index says.
    """
    places = [(s, b) for s in range(len(index.shards)) for b in range(len(index.blocks(s)))]
    places = places[part[0] :: part[1]]
    reader = BlockReader(index, report=report)
    found: list[tuple[int, int, int, int, int, str]] = []
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="fetch") as pool:
        blocks = StreamReader(iter(places), Fetches(reader, pool), AHEAD)
        for shard, number in places:
            block, first_id = blocks.get(shard, number), index.first_id(shard, number)
            offset = index.block_range(shard, number)[0]
            found += (
                (first_id + row, block.label(row), shard, offset + start, size, name)
                for row, (start, size, name) in enumerate(_images(block))
            )
    numbers = np.array([entry[:5] for entry in found], np.int64).reshape(-1, 5)
    return Places(numbers[:, 0], numbers[:, 1], numbers[:, 2:], [entry[5] for entry in found])


def _images(block: Block) -> Iterator[tuple[int, int, str]]:
    for sample in block.samples:
        span = sample.image
        assert span is not None  # Block keeps only samples with an image
        extension = next(name for name, place in sample.fields.items() if place == span)
        yield *span, f"{sample.key.rsplit('/', 1)[-1]}.{extension}"


def choose(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Positions [m], rising, of `fraction` of each class's samples (rounded, one at least).

    labels: [N], -1 for samples that are never chosen.
    """
    order = permutation(seed, Domain.SUBSET, np.arange(len(labels)), epoch=0)
    chosen = []
    for label in np.unique(labels[labels >= 0]):
        own = order[labels[order] == label]
        chosen.append(own[: max(1, round(fraction * len(own)))])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def listed(names: list[str], wanted: list[str], place: str) -> NDArray[np.int64]:
    """Positions [m], rising, of the samples whose file names are `wanted`.

    Extensions do not count, nor does the number that packing puts first. Raises InputError when a
    name is not there. `place`: of the list, for the message.
    """
    known = {_stem(re.sub(r"^\d{8}_", "", name)): i for i, name in enumerate(names)}
    stems = [_stem(line.strip()) for line in wanted if line.strip()]
    missing = [stem for stem in stems if stem not in known]
    if missing or not stems:
        what = f"{len(missing)} of its {len(stems)} names are not in data.train, {missing[:1]}"
        raise InputError(f"{place}: {what if stems else 'names no image'}")
    return np.unique([known[stem] for stem in stems])


def _stem(name: str) -> str:
    """As packing writes it."""
    stem = name.rsplit("/", 1)[-1].rpartition(".")[0] or name
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60]


def write(index: Index, places: Places, url: str, threads: int) -> None:
    """Copy samples to shards of their own at `url`; what stands there of them stays."""
    at = {}
    images = []
    for i, name in enumerate(places.names):
        path = f"{places.ids[i]:012d}/{name}"
        at[path] = places.spans[i].tolist()
        images.append(Image(path, int(places.spans[i, 2]), int(places.labels[i])))

    def read(image: Image) -> bytes:
        shard, start, size = at[image.path]
        return storage.read(index.shard_url(shard), start, start + size)

    plan = plan_shards(ImageSet("", images, index.classes), SHARD_BYTES, seed=0)
    write_shards(plan, url, read, threads=threads)
