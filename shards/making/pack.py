"""Pack images into shards.

Packing has two steps. The first makes a plan that says which image goes where: all images in a
seeded random order, cut into tars of about equal size. The plan is a pure function of the source's
listing, the seed and the shard size. The second step writes the shards in any number of threads.
When it was stopped, it continues where it was, and the shards come out the same, byte for byte.
So what converts images on the way has to be a pure function too; the plan names its options.

A shard is a WebDataset tar. It holds each image as `<number>_<original name>.jpg`, and its class
index in a `.cls` file of the same name. The number is the sample's id.
"""

import contextlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards import index
from shards.blocks import Blocks, check_blocks, checksum
from shards.digest import digest
from shards.documents import Natural, Sum32, build
from shards.errors import InputError
from shards.index import Index, Shard
from shards.philox import Domain, permutation
from shards.samples import Sample, read_samples
from shards.storage import files, upload
from shards.tar import BLOCK
from shards.threads import run_in_threads

STEM_LENGTH = 60

_WORK = ".pack"  # This folder holds what is needed to continue an unfinished packing.
_PLAN = "plan.json"
_FILES = rf"shard-\d+\.tar(\..*)?|{re.escape(index.NAME)}"
# What a process that is killed while it writes leaves on a disk.
_UNFINISHED = re.compile(rf"({_FILES})\.[0-9a-f]{{12}}\.partial")
_WRITTEN = re.compile(rf"{_FILES}|{re.escape(_WORK)}|{_UNFINISHED.pattern}")


class Image(NamedTuple):
    """One image to pack."""

    path: str  # relative to the source
    size: int  # in bytes
    label: int  # class index, or -1 when it has none


@dataclass(frozen=True)
class ImageSet:
    """The images of one data set: a split of the source, or all of it when `name` is ""."""

    name: str
    images: list[Image]
    classes: list[str]


@dataclass(frozen=True)
class Plan:
    """The plan of a packing. Shard i holds images[cuts[i] : cuts[i + 1]], in that order."""

    images: list[Image]
    cuts: list[int]
    classes: list[str]
    pixels: dict[str, Any] = field(default_factory=dict)  # options of what converts the images

    @cached_property
    def digest(self) -> str:
        """SHA-256, as 16 hex digits, of what decides the shards' bytes, except the sources'."""
        facts: list[Any] = [index.BLOCK_BYTES, self.images, self.cuts, self.classes]
        if self.pixels:  # Without options, the digest is that of earlier releases.
            facts.append(sorted(self.pixels.items()))
        return digest(json.dumps(facts))

    @property
    def image_bytes(self) -> int:
        return sum(image.size for image in self.images)


def plan_shards(
    images: ImageSet, shard_bytes: int, seed: int, pixels: dict[str, Any] | None = None
) -> Plan:
    """Put the images in a random order and cut them into shards of about `shard_bytes` each.

    All shards have about the same size, before images are converted. Raises InputError when
    `shard_bytes` is not positive.

    Args:
        pixels: The options of what converts the images, as JSON knows them.
    """
    if shard_bytes <= 0:
        raise InputError("--shard-mb must be positive")
    order = permutation(seed, Domain.PACK, np.arange(len(images.images)), epoch=0)
    shuffled = [images.images[i] for i in order.tolist()]
    ends = np.cumsum([_tar_bytes(image) for image in shuffled])
    return Plan(shuffled, _even_cuts(ends, shard_bytes), images.classes, pixels or {})


def _tar_bytes(image: Image) -> int:
    label = 2 * BLOCK if image.label >= 0 else 0
    return label + BLOCK + -(-image.size // BLOCK) * BLOCK


def _even_cuts(ends: NDArray[np.int64], piece: int) -> list[int]:
    """Cut N items that end at the bytes `ends` [N] into pieces of about `piece` bytes.

    Return the cuts as item numbers, beginning with 0 and ending with N. No piece is empty, and
    the last one is not a small remainder.
    """
    total = int(ends[-1])
    count = max(1, round(total / piece))
    cuts = np.searchsorted(ends, [total * i // count for i in range(1, count)], side="right")
    return sorted({0, *cuts.tolist(), len(ends)})


def _keep(image: Image, content: bytes) -> tuple[str, bytes]:
    """Return an image's extension and content as they are."""
    return image.path.rpartition(".")[2].lower(), content


def write_shards(
    plan: Plan,
    url: str,
    read: Callable[[Image], bytes],
    *,
    convert: Callable[[Image, bytes], tuple[str, bytes]] = _keep,
    threads: int,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda _: None,
    report: Callable[[str], None] = print,
) -> tuple[Index, bool]:
    """Write a plan's shards and index to `url`.

    Return the index, and whether it was written; False means that it was already there. When a
    call was stopped at any point, the next call with the same plan continues. The call needs at
    most about threads x shard size x 2 of memory.

    Raises InputError when `url` holds something else, or when an image has changed since the plan
    was made.

    Args:
        read: Returns an image's bytes. It is called in threads.
        convert: Returns the extension and the bytes to pack in place of an image's bytes. It is
            called in threads, and must be a pure function that `plan.pixels` decides.
        overwrite: Remove what is there instead of raising InputError.
        advance: Is called with the size in bytes of each image that is done.
        report: Takes a message when a store refuses to remove old objects.
    """
    report = cache(report)  # What a store refuses to remove is said once.
    if overwrite:
        _clear(url, report)
        _claim(plan, url)
    elif (standing := _begin(plan, url, report)) is not None:
        return standing, False
    records = set(files.list_names(files.join(url, _WORK)))
    unfinished = list(filter(_UNFINISHED.fullmatch, files.list_names(url)))

    def read_converted(image: Image) -> tuple[str, bytes]:
        content = read(image)
        if len(content) != image.size:
            raise InputError(f"SOURCE {image.path}: has changed meanwhile; run it again")
        return convert(image, content)

    with ThreadPoolExecutor(2 * threads, thread_name_prefix="read") as readers:

        def write_shard(number: int) -> Shard:
            name = f"shard-{number:06d}.tar"
            first, last = plan.cuts[number : number + 2]
            record_url = files.join(url, _WORK, f"{name}.json")
            shard = _find_written(url, name, record_url) if f"{name}.json" in records else None
            if shard is None:
                content = _build(plan.images[first:last], first, read_converted, readers, advance)
                shard = describe(name, read_samples(io.BytesIO(content)), len(content))
                shard.crcs = _compute_crcs(shard, content)
                with upload.open_writer(files.join(url, name)) as file:
                    file.write(content)
                files.write(record_url, json.dumps(_record(shard)).encode())
            else:
                advance(sum(image.size for image in plan.images[first:last]))
            return shard

        shards = run_in_threads(write_shard, range(len(plan.cuts) - 1), threads)
    result = Index(url, shards, plan.classes, plan.digest, pixels=plan.pixels)
    result.save()
    # By now another process, which writes the same shards, has renamed its own of these files.
    for name in [*unfinished, _WORK]:
        files.discard(files.join(url, name), url, report)
    return result, True


def _clear(url: str, report: Callable[[str], None]) -> None:
    """Remove what an earlier packing wrote. What can't be removed is emptied.

    The index goes first, because it must not describe shards that are replaced.
    """
    names = set(filter(_WRITTEN.fullmatch, files.list_names(url)))
    names |= {f"{_WORK}/{name}" for name in files.list_names(files.join(url, _WORK))}

    def clear(name: str) -> None:
        files.discard_or_empty(files.join(url, name), url, report)

    if index.NAME in names:
        clear(index.NAME)
    run_in_threads(clear, sorted(names - {index.NAME, _WORK}), files.DELETIONS)


def _claim(plan: Plan, url: str) -> None:
    files.write(files.join(url, _WORK, _PLAN), json.dumps(plan.digest).encode())


def _begin(plan: Plan, url: str, report: Callable[[str], None]) -> Index | None:
    """Claim `url` for the plan. Return the index if the plan has already been carried out there."""
    names = files.list_names(url)
    if index.NAME in names and files.size(files.join(url, index.NAME)) == 0:
        names.remove(index.NAME)  # `_clear` could not remove it.
    plan_url = files.join(url, _WORK, _PLAN)
    claimed = _PLAN in files.list_names(files.join(url, _WORK))
    if index.NAME in names:
        standing = index.load(url, "OUT")
        if standing.plan == plan.digest:
            files.discard(files.join(url, _WORK), url, report)
            return standing
    elif claimed and _read_claim(plan_url) == plan.digest:
        return None
    elif not claimed and not any(name.endswith(".tar") for name in names):
        _claim(plan, url)
        return None
    state = "" if index.NAME in names else ", unfinished"
    raise InputError(
        f"OUT {files.redact(url)}: holds other shards{state} (another source, labels, seed, "
        "shard size or pixels): choose another OUT, or replace them with --overwrite"
    )


def _read_claim(plan_url: str) -> Any:
    """Return the digest of the plan that is being carried out; None when the file is damaged."""
    try:
        return files.read_json(plan_url)
    except ValueError:
        return None


@dataclass(frozen=True)
class _Written:
    """The record of a shard that was written."""

    samples: Natural
    bytes: Natural
    blocks: Any
    crcs: list[Sum32]


def _record(shard: Shard) -> dict[str, Any]:
    assert shard.blocks is not None
    blocks = shard.blocks.tolist()
    return {
        "samples": shard.samples,
        "bytes": shard.bytes,
        "blocks": blocks,
        "crcs": shard.crcs,
    }


def _compute_crcs(shard: Shard, content: bytes) -> list[int]:
    assert shard.blocks is not None
    starts = shard.blocks[:, 0].tolist()
    ends = [*starts[1:], len(content)]
    return [zlib.crc32(content[start:end]) for start, end in zip(starts, ends, strict=True)]


def _find_written(url: str, name: str, record_url: str) -> Shard | None:
    """Return the shard that an earlier run wrote, if it is still there with the same size."""
    # A damaged record counts as no record, and the shard is written again.
    with contextlib.suppress(FileNotFoundError, ValueError, InputError):
        record = build(_Written, files.read_json(record_url))
        blocks = check_blocks(record.blocks, record.samples, record.bytes, "blocks")
        size = files.size(files.join(url, name))
        if size == record.bytes and len(record.crcs) == len(blocks):
            return Shard(name, record.samples, size, blocks, checksum(blocks), record.crcs)
    return None


def _build(
    images: list[Image],
    first_id: int,
    read: Callable[[Image], tuple[str, bytes]],
    readers: ThreadPoolExecutor,
    advance: Callable[[int], None],
) -> bytes:
    """Build the bytes of one tar. `read` returns the extension and the bytes of an image."""
    from webdataset.writer import TarWriter  # imports torch, which takes seconds

    tar = io.BytesIO()
    with TarWriter(tar, encoder=False, mtime=0) as writer:
        contents = readers.map(read, images)
        for number, (image, found) in enumerate(zip(images, contents, strict=True)):
            extension, content = found
            stem, _, _ = image.path.rpartition("/")[2].rpartition(".")
            key = f"{first_id + number:08d}_{plain_stem(stem)}"
            fields: dict[str, Any] = {"__key__": key}
            fields[extension] = content
            if image.label >= 0:
                fields["cls"] = str(image.label).encode()
            writer.write(fields)
            advance(image.size)
    return tar.getvalue()


def describe(name: str, samples: Iterable[Sample], size: int) -> Shard:
    """Make a shard's entry in the index, with blocks of about `index.BLOCK_BYTES`.

    Samples without an image are not counted.

    Args:
        size: The tar's length in bytes.
    """
    starts = [sample.start for sample in samples if sample.image]
    return describe_starts(name, np.array(starts, np.int64), size)


def describe_starts(name: str, starts: NDArray[np.int64], size: int) -> Shard:
    """Make a shard's entry in the index from the offsets [N] of its samples with an image."""
    blocks: Blocks = np.empty((0, 2), np.int64)
    if len(starts):
        cuts = np.array(_even_cuts(np.append(starts[1:], size), index.BLOCK_BYTES))
        blocks = np.stack((starts[cuts[:-1]], np.diff(cuts)), axis=1)
    return Shard(name, len(starts), size, blocks, checksum(blocks))


def plain_stem(stem: str) -> str:
    """Convert a file name without its extension to the form that sample keys use."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:STEM_LENGTH]
