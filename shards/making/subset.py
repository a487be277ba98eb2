"""Make a data set from a part of another: a fraction of each class, or the images of a list.

The choice is a pure function of the data set, the fraction and the seed. The images are copied to
new shards once, so that training on 1% of them does not read the other 99% in every epoch.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.index import Index
from shards.making.pack import Image, ImageSet, plain_stem, plan_shards, write_shards
from shards.philox import Domain, permutation
from shards.reader import BlockReader, read_blocks
from shards.samples import Block
from shards.storage import files

Ids = NDArray[np.int64]
AHEAD = 16  # This many blocks are fetched ahead.
SHARD_BYTES = 64_000_000


class Places(NamedTuple):
    """The places of the images of some samples."""

    ids: NDArray[np.int64]  # [n] sample ids, rising
    labels: NDArray[np.int64]  # [n] class indices, -1 where there is none
    spans: NDArray[np.int64]  # [n, 3] shard, byte offset in it, size in bytes
    names: list[str]  # [n] key and extension, such as n01440764_10026.jpg

    def take(self, which: NDArray[np.int64]) -> "Places":
        """Return the places at the positions `which` [m]."""
        names = [self.names[i] for i in which.tolist()]
        return Places(self.ids[which], self.labels[which], self.spans[which], names)

    @staticmethod
    def join(parts: "Sequence[Places]") -> "Places":
        """Join the places that several processes found, and sort them by id."""
        whole = Places(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.spans for part in parts]),
            [name for part in parts for name in part.names],
        )
        return whole.take(np.argsort(whole.ids, kind="stable"))


def find_places(index: Index, part: tuple[int, int], report: Callable[[str], None]) -> Places:
    """Find the places of all samples by reading a data set once.

    Raises InputError when a shard does not hold what the index says.

    Args:
        part: (i, n) Read only every n-th block, from the i-th on.
        report: Takes warnings about damaged shards.
    """
    places = index.places(np.arange(part[0], index.block_counts.sum(), part[1]))
    reader = BlockReader(index, report=report)
    found: list[tuple[int, int, int, int, int, str]] = []
    for (shard, number), block in read_blocks(reader, places, AHEAD):
        first_id = index.first_id(shard, number)
        offset = index.block_range(shard, number)[0]
        found += (
            (first_id + row, block.label(row), shard, offset + start, size, name)
            for row, (start, size, name) in enumerate(_read_images(block))
        )
    numbers = np.array([entry[:5] for entry in found], np.int64).reshape(-1, 5)
    return Places(numbers[:, 0], numbers[:, 1], numbers[:, 2:], [entry[5] for entry in found])


def _read_images(block: Block) -> Iterator[tuple[int, int, str]]:
    for sample in block.samples:
        span = sample.image
        assert span is not None  # A Block keeps only samples with an image.
        yield *span, f"{sample.key.rsplit('/', 1)[-1]}.{sample.image_field}"


def choose(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Choose a fraction of each class's samples at random. Return their rising positions [m].

    The number is rounded, and is at least one for each class.

    Args:
        labels: [N] Class indices. Samples with -1 are never chosen.
    """
    order = permutation(seed, Domain.SUBSET, np.arange(len(labels)), epoch=0)
    chosen = []
    for label in np.unique(labels[labels >= 0]):
        own = order[labels[order] == label]
        chosen.append(own[: max(1, round(fraction * len(own)))])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def find_listed(places: Places, classes: list[str], wanted: list[str], list_name: str) -> Ids:
    """Find the samples whose file names are in a list. Return their rising positions [m].

    Extensions are ignored, and so is the number that packing puts before a name. A folder before a
    name gives its class, which is used when several classes have a file of that name. Raises
    InputError when a name matches no sample or several.

    Args:
        wanted: Lines of the list, each with one file name. Empty lines are ignored.
        list_name: Name of the list, for messages.
    """
    known: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(places.names):
        known[_stem(name)].append(i)
    lines = [line.strip() for line in wanted if line.strip()]
    if not lines:
        raise InputError(f"{list_name}: names no image")
    chosen = []
    for line in lines:
        found = known.get(_stem(line), [])
        folder = line.rpartition("/")[0].rpartition("/")[2]
        if len(found) > 1 and folder in classes:
            label = classes.index(folder)
            found = [i for i in found if places.labels[i] == label]
        if len(found) != 1:
            what = "is not in" if not found else f"stands for {len(found)} images of"
            hint = ": put its class's folder before it" if found and not folder else ""
            raise InputError(f"{list_name}: {line} {what} data.train{hint}")
        chosen += found
    return np.unique(np.array(chosen, np.int64))


def _stem(path: str) -> str:
    """Return a file's name in the form that packing gives it, without number and extension."""
    name = re.sub(r"^\d{8}_", "", path.rpartition("/")[2])
    return plain_stem(name.rpartition(".")[0] or name)


def write(index: Index, places: Places, url: str, threads: int) -> None:
    """Copy samples to shards of their own at `url`. Shards that are already there are kept."""
    at = {}
    images = []
    for i, name in enumerate(places.names):
        path = f"{places.ids[i]:012d}/{name}"
        at[path] = places.spans[i].tolist()
        images.append(Image(path, int(places.spans[i, 2]), int(places.labels[i])))

    def read(image: Image) -> bytes:
        shard, start, size = at[image.path]
        return files.read(index.shard_url(shard), start, start + size)

    plan = plan_shards(ImageSet("", images, index.classes), SHARD_BYTES, seed=0)
    write_shards(plan, url, read, threads=threads)
