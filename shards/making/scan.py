"""Make an index for tars that others made, by reading their headers once."""

import contextlib
import io
from collections.abc import Callable, Iterator

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from shards import index
from shards.errors import InputError
from shards.index import Index, Shard
from shards.making.pack import describe, run_in_threads
from shards.storage import files
from shards.tar import TarError, parse_label, read_samples

MOST_CLASSES = 1 << 20


def index_tars(
    source: str,
    *,
    classes: list[str] | None,
    threads: int,
    report: Callable[[str], None],
    advance: Callable[[int], None] = lambda _: None,
) -> Index:
    """Write the index of tars that others made, in their folder, and return it.

    Samples without an image do not count. Raises InputError naming the tar that is damaged or
    missing.

    Args:
        source: A folder or a brace pattern.
        classes: Names of the class indices that the `.cls` files hold. Without them, the names of
            an existing index are kept if there are enough of them.
        report: Takes warnings, each of one line.
        advance: Is called with the size in bytes of each tar that is done.
    """
    urls = list(_tar_urls(source))
    folder = urls[0].rpartition("/")[0] or "."
    if any((url.rpartition("/")[0] or ".") != folder for url in urls):
        raise InputError(
            f"SOURCE {files.redact(source)}: the tars must all lie in one folder, "
            f"for one {index.NAME}"
        )

    def scan(url: str) -> tuple[Shard, NDArray[np.int64]]:
        shard, labels = _scan(url)
        advance(shard.bytes)
        return shard, labels

    scanned = run_in_threads(scan, urls, threads)
    for url, (shard, _) in zip(urls, scanned, strict=True):
        if shard.samples == 0:
            report(f"{files.redact(url)}: no images in it; left out")
    shards = [shard for shard, _ in scanned if shard.samples]
    if not shards:
        raise InputError(f"SOURCE {files.redact(source)}: no images in the tars there")
    labels = np.concatenate([labels for _, labels in scanned])
    count = int(labels.max()) + 1
    if count > MOST_CLASSES:
        raise InputError(f"SOURCE {files.redact(source)}: .cls {count - 1} is no class index")
    if classes is not None and len(classes) < count:
        raise InputError(f"--classes names {len(classes)} classes, but .cls goes up to {count - 1}")
    if classes is None:
        known = _known_classes(folder)
        classes = known if len(known) >= count > 0 else [str(i) for i in range(count)]
    if _looks_sorted(labels):
        report(
            "the samples look sorted by class. Training reads blocks of about "
            f"{index.BLOCK_BYTES >> 20} MB of consecutive samples, so a batch would hold few "
            "classes: repack the images with `python launch/pack.py SOURCE OUT`, which shuffles"
        )
    result = Index(folder, shards, classes)
    result.save()
    return result


def _tar_urls(source: str) -> Iterator[str]:
    if source.endswith(".tar"):
        try:
            yield from braceexpand(source, escape=False)  # Backslashes stand for themselves.
        except ValueError as error:
            raise InputError(
                f"SOURCE {files.redact(source)}: not a brace pattern: {error}"
            ) from None
        return
    names = [name for name in files.list_names(source) if name.endswith(".tar")]
    if not names:
        raise InputError(f"SOURCE {files.redact(source)}: no .tar files there")
    for name in names:
        yield files.join(source, name)


def _scan(url: str) -> tuple[Shard, NDArray[np.int64]]:
    """Return a tar's entry in the index, and the labels [samples] of its image samples."""
    place = f"SOURCE {files.redact(url)}"
    try:
        with files.open_reader(url) as file:
            samples = [sample for sample in read_samples(file, whole=True) if sample.image]
            labels = np.full(len(samples), -1, np.int64)
            for i, sample in enumerate(samples):
                if sample.label is not None:
                    offset, size = sample.label
                    file.seek(offset)
                    labels[i] = parse_label(file.read(size))
            size = file.seek(0, io.SEEK_END)
    except FileNotFoundError:
        raise InputError(f"{place}: not there") from None
    except TarError as error:
        raise InputError(f"{place}: damaged: {error}") from None
    return describe(url.rpartition("/")[2], samples, size), labels


def _known_classes(url: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError, InputError, KeyError, TypeError):
        return index.class_names(index.read_document(url))
    return []


def _looks_sorted(labels: NDArray[np.int64]) -> bool:
    """Return whether neighbors share their class much more often than in a random order."""
    labels = labels[labels >= 0]
    if len(labels) < 2:
        return False
    shuffled = float(((np.bincount(labels) / len(labels)) ** 2).sum())
    found = float((labels[1:] == labels[:-1]).mean())
    return shuffled < 1 and found > (1 + shuffled) / 2
