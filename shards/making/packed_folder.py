"""Pack a plain folder of labeled images into a cache, and pack it again only when it has changed.

What is packed lies in a folder that is named by the digest of its plan: of the names, sizes and
classes of all images. So whoever lists the same images finds it. An image that was replaced by
another one of the same name and size is not noticed.
"""

import warnings
from collections.abc import Callable

from shards import index as indexes
from shards.errors import InputError
from shards.making import pack
from shards.making.contents import Contents
from shards.making.convert import PixelOptions
from shards.making.image_folders import find_images
from shards.making.left_out import tabulate
from shards.making.survey import ReadImage, choose_window
from shards.storage import files

SHARD_BYTES = 64_000_000


def keep_packed(
    source: str,
    cache: str,
    options: PixelOptions,
    *,
    name: str,
    threads: int,
    report: Callable[[str], None],
) -> str:
    """Pack the folder `source` to a folder below `cache`, unless it is there, and return its URL.

    What was packed there of other images is removed.

    Args:
        options: How pixels are converted.
        name: The field that gave `source`, for messages.
        threads: Number of shards written at a time.

    Raises InputError when the folder is none of images in one folder for each class.
    """
    place = files.redact(source)
    try:
        return _keep_packed(source, cache, options, name, threads, report)
    except InputError as error:
        told, there = str(error), f"SOURCE {place}: "
        if not told.startswith("SOURCE "):
            raise
        told = told.removeprefix(there).removeprefix("SOURCE ")
        remedy = "give shards of `python launch/pack.py`, or a folder with one folder a class"
        raise InputError(f"{name} {place}: {told}; {remedy}") from None


def _keep_packed(
    source: str,
    cache: str,
    options: PixelOptions,
    name: str,
    threads: int,
    report: Callable[[str], None],
) -> str:
    images, lines = _find_labeled(source, name)

    def read(image: pack.Image, start: int | None = None, stop: int | None = None) -> bytes:
        return files.read(files.join(source, image.path), start, stop)

    plan = pack.plan_shards(images, SHARD_BYTES, 0, options.facts())
    url = files.join(cache, plan.digest)
    if not files.exists(files.join(url, indexes.NAME)):
        report(f"packing {len(images.images):,} images of {files.redact(source)} for evaluations")
        for line in lines:
            report(line.strip().replace("SOURCE", name))
        with warnings.catch_warnings():  # those of Pillow that matter are counted
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _check_depth(images, read, options, source, threads)
            _write(plan, url, read, options, threads, report)
    for other in set(files.list_names(cache)) - {plan.digest}:
        files.discard(files.join(cache, other), cache, report)
    return url


def _find_labeled(source: str, name: str) -> tuple[pack.ImageSet, list[str]]:
    """Find the images of a folder; return them, and lines about what is left out and doubtful."""
    found = find_images(source)
    place = files.redact(source)
    if not found.sets:  # only tars
        indexes.load(source, name)  # raises, with the remedy
    if len(found.sets) > 1 or found.sets[0].name:
        names = " and ".join(one.name for one in found.sets)
        raise InputError(f"SOURCE {place}: holds the splits {names}: give the folder of one")
    (images,) = found.sets
    if not images.classes:
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
