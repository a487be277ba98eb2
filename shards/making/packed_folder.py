"""Pack a plain folder of images into a cache, and pack it again only when it has changed.

What is packed lies in a folder that is named by the digest of its plan: of the names, sizes and
classes of all images. So whoever lists the same images finds it. An image that was replaced by
another one of the same name and size is not noticed.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shards import index as indexes
from shards.errors import InputError
from shards.making import pack
from shards.making.contents import Contents
from shards.making.convert import PixelOptions
from shards.making.image_folders import find_images
from shards.making.left_out import tabulate
from shards.making.survey import ReadImage, choose_window
from shards.storage import files, misplaced
from shards.storage.commands import spell_program

SHARD_BYTES = 64_000_000


@dataclass(frozen=True)
class Folder:
    """A plain folder of images that can be packed."""

    source: str
    name: str  # the field that gave it, for messages
    images: pack.ImageSet
    lines: list[str]  # about what is left out and doubtful

    def keep_packed(
        self,
        cache: str,
        options: PixelOptions,
        *,
        threads: int,
        report: Callable[[str], None],
        alone: bool = True,
    ) -> str:
        """Pack the images to a folder below `cache`, unless it is there, and return its URL.

        Args:
            options: How pixels are converted.
            threads: Number of shards written at a time.
            alone: Whether what was packed there of other images is removed.

        Raises InputError when the images cannot be packed with these options.
        """
        with _naming(self.source, self.name):
            url = self._pack(cache, options, threads, report)
        for other in set(files.list_names(cache)) - {misplaced.last_name(url)} if alone else ():
            files.discard(files.join(cache, other), cache, report)
        return url

    def _pack(
        self, cache: str, options: PixelOptions, threads: int, report: Callable[[str], None]
    ) -> str:
        def read(image: pack.Image, start: int | None = None, stop: int | None = None) -> bytes:
            return files.read(files.join(self.source, image.path), start, stop)

        plan = pack.plan_shards(self.images, SHARD_BYTES, 0, options.facts())
        url = files.join(cache, plan.digest)
        if files.exists(files.join(url, indexes.NAME)):
            return url
        number, place = len(self.images.images), files.redact(self.source)
        report(f"packing {number:,} images of {place} for evaluations")
        for line in self.lines:
            report(line.strip().replace("SOURCE", self.name))
        with warnings.catch_warnings():  # those of Pillow that matter are counted
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _check_depth(self.images, read, options, self.source, threads)
            _write(plan, url, read, options, threads, report)
        return url


def find_folder(source: str, name: str, *, labels: bool = True) -> Folder:
    """List the images of a folder.

    Args:
        name: The field that gave `source`, for messages.
        labels: Whether images without labels are refused.

    Raises InputError when the folder is none of images, or has no folder for each class.
    """
    with _naming(source, name):
        return Folder(source, name, *_find_images(source, name, labels))


@contextmanager
def _naming(source: str, name: str) -> Iterator[None]:
    """Let messages name the field, which packing calls SOURCE, and whose the options are."""
    place = files.redact(source)
    try:
        yield
    except InputError as error:
        told, there = str(error), f"SOURCE {place}: "
        if not told.startswith("SOURCE "):
            raise
        told = told.removeprefix(there).removeprefix("SOURCE ")
        told = told.replace(" --window", " pack.py --window")
        remedy = "give shards of `python launch/pack.py`, or a folder with one folder a class"
        raise InputError(f"{name} {place}: {told}; {remedy}") from None


def _find_images(source: str, name: str, labels: bool) -> tuple[pack.ImageSet, list[str]]:
    """Find the images of a folder; return them, and lines about what is left out and doubtful."""
    found = find_images(source, follower=f"`{spell_program('pack.py', '--follow-links')}`")
    place = files.redact(source)
    if not found.sets:  # only tars
        indexes.load(source, name)  # raises, with the remedy
    if len(found.sets) > 1 or found.sets[0].name:
        names = " and ".join(one.name for one in found.sets)
        raise InputError(f"SOURCE {place}: holds the splits {names}: give the folder of one")
    (images,) = found.sets
    if labels and not images.classes:
        raise InputError(f"SOURCE {place}: its images have no labels")
    lines = tabulate({"images taken": len(images.images)}, found.left_out)
    return images, [*(lines if found.left_out else []), *found.warnings]


def _check_depth(
    images: pack.ImageSet, read: ReadImage, options: PixelOptions, source: str, threads: int
) -> None:
    """Raise InputError when images have more than 8 bits and nothing says which values to take."""
    if options.window is None:
        choose_window(
            images.images,
            read,
            None,
            place=files.redact(source),
            most=options.max_pixels,
            threads=threads,
        )


def _write(
    plan: pack.Plan,
    url: str,
    read: ReadImage,
    options: PixelOptions,
    threads: int,
    report: Callable[[str], None],
) -> None:
    contents = Contents(options)
    pack.write_shards(plan, url, read, convert=contents.convert, threads=threads, report=report)
    for line in [*contents.list_conversions(), *contents.list_faults(len(plan.images))]:
        report(line)
