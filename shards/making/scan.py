"""Make an index for tars that others made, by reading their headers once."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from shards import index
from shards.errors import InputError
from shards.index import Index, Shard
from shards.making.image_folders import LeftOut, leave_out
from shards.making.pack import describe, run_in_threads
from shards.storage import files
from shards.tar import IMAGE_FIELDS, LABEL_FIELD, Sample, TarError, parse_label, read_samples

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

    def scan(url: str) -> _Scan:
        found = _scan(url)
        advance(found.shard.bytes)
        return found

    scanned = run_in_threads(scan, urls, threads)
    left_out: dict[str, LeftOut] = {}
    for found in scanned:
        for reason, left in found.left_out.items():
            so_far = left_out.get(reason, LeftOut(0, left.example))
            left_out[reason] = so_far._replace(number=so_far.number + left.number)
    for reason, left in left_out.items():
        samples = "sample" if left.number == 1 else "samples"
        report(f"{left.number:,} {samples} {reason}, such as {left.example}")
    shards = [found.shard for found in scanned if found.shard.samples]
    if not shards:
        raise InputError(
            f"SOURCE {files.redact(source)}: no images in the tars there: a sample needs a field "
            f"{', '.join(IMAGE_FIELDS)}"
        )
    labels = np.concatenate([found.labels for found in scanned])
    unlabeled = int((labels < 0).sum())
    if 0 < unlabeled < len(labels):
        report(f"{unlabeled:,} of {len(labels):,} samples have no label")
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
    result = Index(folder, shards, classes, pixels=_known_pixels(folder))
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


class _Scan(NamedTuple):
    """What a tar holds."""

    shard: Shard
    labels: NDArray[np.int64]  # [samples], -1 without a label
    left_out: dict[str, LeftOut]


def _scan(url: str) -> _Scan:
    """Read the headers and labels of a tar."""
    left_out: dict[str, LeftOut] = {}
    tar = url.rpartition("/")[2]
    place = f"SOURCE {files.redact(url)}"
    try:
        with files.open_reader(url) as file:
            samples = []
            for sample in read_samples(file, whole=True):
                if sample.image:
                    samples.append(sample)
                else:
                    leave_out(left_out, _reason_against(sample), f"{tar}: {sample.key}")
            labels = np.full(len(samples), -1, np.int64)
            for i, sample in enumerate(samples):
                if sample.label is not None:
                    offset, size = sample.label
                    file.seek(offset)
                    labels[i] = parse_label(file.read(size))
                    if labels[i] < 0:
                        reason = f"without a label, as .{LABEL_FIELD} is no class index"
                        leave_out(left_out, reason, f"{tar}: {sample.key}")
            size = file.seek(0, io.SEEK_END)
    except FileNotFoundError:
        raise InputError(f"{place}: not there") from None
    except TarError as error:
        raise InputError(f"{place}: damaged: {error}") from None
    return _Scan(describe(tar, samples, size), labels, left_out)


def _reason_against(sample: Sample) -> str:
    """Return why a sample without an image field is left out."""
    kinds = sorted({name.rpartition(".")[2] for name in sample.fields})
    if set(kinds) & set(IMAGE_FIELDS):
        return "left out, because a field is all that follows the first dot: take dots out of names"
    return f"left out, whose only fields are {', '.join(kinds[:5])}{', ...' * (len(kinds) > 5)}"


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


def _known_pixels(url: str) -> dict[str, Any]:
    """Return the options by which packing converted the images, from an index that stands there."""
    with contextlib.suppress(FileNotFoundError, InputError, KeyError, TypeError):
        return dict(index.read_document(url)["pixels"])
    return {}
