"""Read the images that features are computed of: packed shards, or a plain folder of images."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from hashlib import sha256
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.encoder.preprocessing import decode_file
from engine.evaluation.given_sets import refuse_run
from shards import index as indexes
from shards.center_crops import LOCAL_AHEAD, REMOTE_AHEAD
from shards.decode import DecodeError, PixelRules
from shards.decode_threads import count_useful
from shards.errors import InputError
from shards.index import Index
from shards.making.convert import PixelOptions
from shards.making.image_folders import Found, find_all_images
from shards.making.left_out import Reasons
from shards.making.pack import Image
from shards.making.survey import choose_window
from shards.reader import BlockReader, read_blocks
from shards.samples import Block
from shards.storage import files
from shards.threads import map_ahead

REMOTE_READS = 32  # So many files of a folder in an object store are read at once.


class Sample(NamedTuple):
    """One image of a data set."""

    id: int  # its number in the data set
    name: str  # the file's path in the folder, or the sample's key
    label: int  # -1 where there is none
    decode: Callable[[], Tensor]  # returns uint8 [3, H, W]; raises DecodeError


class Images(Protocol):
    """What features are computed of."""

    url: str
    samples: int
    classes: list[str]
    digest: str
    content: str  # a digest that knows more of the images, where more is known
    left_out: Reasons
    together: int  # the number of images that a thread takes at a time
    facts: dict[str, Any]  # what else decides the pixels

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        """Yield the samples with the numbers [start, stop), in this order."""
        ...

    def count_threads(self, most: int, pixels: int, /) -> int:
        """Return how many threads should read, for crops of so many pixels."""
        ...


class ShardImages:
    """The images of a data set that has an index."""

    together = 16

    def __init__(self, index: Index, rules: PixelRules, report: Callable[[str], None]) -> None:
        """Open the data set. `report` takes warnings about damaged shards."""
        self.samples, self.classes, self.digest = index.samples, index.classes, index.digest
        self.content = index.content
        self.url, self.left_out = index.url, Reasons()
        self.facts: dict[str, Any] = {}
        self._index, self._reader = index, BlockReader(index, report=report, rules=rules)

    def count_threads(self, most: int, pixels: int) -> int:
        """Return how many of `most` threads are useful; small images need one."""
        return max(1, count_useful(most, self._index, pixels))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Where each of all blocks ends."""
        return self._index.block_ends()

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        """Yield the samples with the numbers [start, stop), in this order."""
        low = int(np.searchsorted(self._ends, start, side="right"))
        high = int(np.searchsorted(self._ends, stop, side="left")) + 1
        places = self._index.places(np.arange(low, min(high, len(self._ends))))
        ahead = LOCAL_AHEAD if files.is_local(self._index.folder) else REMOTE_AHEAD
        for place, block in read_blocks(self._reader, places, ahead):
            first = self._index.first_id(*place)
            for row in range(max(0, start - first), min(len(block), stop - first)):

                def decode(block: Block = block, row: int = row) -> Tensor:
                    return self._reader.decode(block, row)

                yield Sample(first + row, block.samples[row].key, block.label(row), decode)


class FolderImages:
    """The images of a plain folder, with or without a folder for each class."""

    together = 1  # Each is a file of its own, which a thread waits for.

    def __init__(
        self,
        url: str,
        found: Found,
        options: PixelOptions,
        rules: PixelRules,
    ) -> None:
        """Take the images that `find_all_images` found."""
        (whole,) = found.sets
        images = whole.images
        self.samples, self.classes, self.left_out = len(images), whole.classes, found.left_out
        self.options, self.rules = options, rules
        self.facts = options.facts()
        self.url, self._images = url, images
        summed = sha256()  # of the names and sizes of all files
        for image in images:
            summed.update(f"{image.path}\0{image.size}\0".encode(errors="surrogateescape"))
        self.digest = self.content = summed.hexdigest()[:16]

    def count_threads(self, most: int, _pixels: int) -> int:
        """Return `most`, or more in an object store, where threads wait for most of their time."""
        return most if files.is_local(self.url) else max(most, REMOTE_READS)

    def find_window(self, percentiles: tuple[float, float] | None, threads: int) -> None:
        """Find the window of the images of more than 8 bits per channel, if there are any.

        Raises InputError when they need one and neither it nor percentiles are given.
        """

        def read(image: Image, start: int | None = None, stop: int | None = None) -> bytes:
            return files.read(files.join(self.url, image.path), start, stop)

        with _naming_data():
            window = choose_window(
                self._images,
                read,
                percentiles,
                place=files.redact(self.url),
                most=self.options.max_pixels,
                threads=threads,
            )
        self.options = PixelOptions(self.options.max_pixels, window=window)
        self.facts = self.options.facts()

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        """Yield the samples with the numbers [start, stop), in the order of their names."""
        for number in range(start, stop):
            image = self._images[number]

            def decode(image: Image = image) -> Tensor:
                return self._decode(image)

            yield Sample(number, image.path, image.label, decode)

    def _decode(self, image: Image) -> Tensor:
        url = files.join(self.url, image.path)
        try:
            content = files.read(url)
        except FileNotFoundError:
            content = b""
        if len(content) != image.size:
            raise InputError(f"DATA {files.redact(url)}: has changed meanwhile; run it again")
        with _naming_data():
            return decode_file(image.path, content, self.options, self.rules)


@contextmanager
def _naming_data() -> Iterator[None]:
    """Let messages name DATA and --data.window, which packing calls SOURCE and --window."""
    try:
        yield
    except InputError as error:
        told = str(error).replace("SOURCE", "DATA", 1).replace(" --window", " --data.window")
        raise InputError(told) from None


def open_images(
    url: str,
    rules: PixelRules,
    options: PixelOptions,
    percentiles: tuple[float, float] | None,
    *,
    follow_links: bool,
    threads: int,
    report: Callable[[str], None],
) -> Images:
    """Open shards, where the folder has an index, or else a folder of images.

    Args:
        options: The pixels of a folder's images; those of shards were decided by packing.
        percentiles: The percentiles that make the window in `options`, when it has none.
        follow_links: Also take files outside of the folder that links in it lead to.
        report: Takes warnings.

    Raises InputError when there are no images, or when they need a window of values.
    """
    if files.exists(files.join(url, indexes.NAME)):
        return ShardImages(indexes.load(url, "DATA"), rules, report)
    refuse_run(url, "DATA")
    found = find_all_images(url, "DATA", follow_links=follow_links, follower="--data.follow-links")
    folder = FolderImages(url, found, options, rules)
    if options.window is None:
        folder.find_window(percentiles, threads)
    return folder


def load(
    samples: Iterator[Sample], cut: Callable[[Tensor], Tensor], threads: int, together: int = 1
) -> Iterator[tuple[Sample, Tensor | DecodeError]]:
    """Decode samples in threads, and yield each in order, with what `cut` makes of its pixels.

    A sample that cannot be decoded is yielded with its fault.

    Args:
        together: Number of samples that a thread takes at a time.
    """

    def work(chunk: list[Sample]) -> list[tuple[Sample, Tensor | DecodeError]]:
        return [(sample, _cut_one(sample, cut)) for sample in chunk]

    chunks = iter(lambda: list(islice(samples, together)), [])
    with closing(map_ahead(work, chunks, threads, threads * max(2, 4 // together))) as found:
        for chunk in found:
            yield from chunk


def _cut_one(sample: Sample, cut: Callable[[Tensor], Tensor]) -> Tensor | DecodeError:
    try:
        return cut(sample.decode())
    except DecodeError as error:
        return error
