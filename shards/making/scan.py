"""Make an index for tars that others made, by reading their headers and labels once."""

import contextlib
import os
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards import index
from shards.errors import InputError
from shards.index import Index
from shards.making import kept_scans
from shards.making.image_folders import split_name
from shards.making.labels import Labels, number_labels
from shards.making.left_out import Reasons, explain, leave_out, merge, tell_each
from shards.making.listing import PATTERN_HINT
from shards.making.scan_tar import Scan, scan_tar
from shards.making.tars import Tars, check_is_file, same_place
from shards.making.undecodable import find_fault
from shards.making.unpack import find_compression
from shards.samples import FieldTwice, Layout
from shards.storage import files, names
from shards.storage.redaction import user_info
from shards.storage.skim import open_skim
from shards.tar import BLOCK, TarError
from shards.threads import run_in_threads

REMOTE_THREADS = 4  # Times as many tars are scanned at once, because each waits for its answers.

_REPACKS = "`python launch/pack.py SOURCE OUT` repacks"
_LARGE = 64 << 20  # A block of more bytes than these is warned about.
_ELSEWHERE = f"write {index.NAME} elsewhere with --out URL"
NOT_THERE = "not there"


class Damaged(NamedTuple):
    """A tar that cannot be read to its end."""

    url: str
    reason: str
    samples: int  # that were found before the damage


class Indexed(NamedTuple):
    """The index that was made of tars, and what it leaves out."""

    made: Index
    left_out: Reasons
    warnings: list[str]  # each of one line


def index_tars(
    tars: Tars,
    *,
    out: str,
    layout: Layout,
    classes: list[str] | None,
    skip_damaged: bool,
    threads: int,
    report: Callable[[str], None],
    advance: Callable[[int], None] = lambda _: None,
) -> Indexed:
    """Scan tars that others made, and return their index, which is not saved yet.

    What was found in each tar is kept at `out`, so that a call that was stopped continues. Raises
    InputError when nothing can be taken, and when tars are damaged unless `skip_damaged`.

    Args:
        out: URL of the folder that the index belongs to.
        layout: How members make samples. `named` is found out.
        classes: Names of the classes. Without them, those of an existing index are kept if there
            are enough of them.
        report: Takes a line for each damaged tar.
        advance: Is called with the size in bytes of each tar that is done.
    """
    base, stop = _check_places(tars, out), Event()

    def scan(name: str) -> Scan | Damaged:
        found = _scan_once(tars.folder, name, layout, out, stop)
        advance(0 if isinstance(found, Damaged) else found.shard.bytes)
        return found

    if not files.is_local(tars.folder):
        threads *= REMOTE_THREADS
    results = run_in_threads(scan, tars.names, threads, stop)
    damaged = [found for found in results if isinstance(found, Damaged)]
    left_out = dict(tars.left_out)
    _tell_damaged(damaged, len(results), skip_damaged, left_out, report)
    scans = [found for found in results if isinstance(found, Scan)]
    for found in scans:
        merge(left_out, found.left_out)
        if not found.shard.samples and not found.left_out:
            leave_out(left_out, "tars without any sample", found.shard.name)
    scans = [found for found in scans if found.shard.samples]
    place = f"SOURCE {files.redact(tars.folder)}"
    if not scans:
        raise InputError(f"{place}: no images in the tars there{explain(left_out)}")
    labels = number_labels(
        [text for found in scans for text in found.labels],
        classes,
        _known_classes(out),
        place,
    )
    made = Index(out, [found.shard for found in scans], labels.classes, base=base)
    made.layout = replace(layout, named=labels.named)
    made.pixels = _known_pixels(tars.folder)
    _keep_records(made, tars.folder)
    return Indexed(made, left_out, labels.warnings + _doubts(labels, scans))


def save(indexed: Indexed, report: Callable[[str], None]) -> None:
    """Write the index, and remove what was kept for it."""
    indexed.made.save()
    kept_scans.forget(indexed.made.url, report)


def _check_places(tars: Tars, out: str) -> str:
    """Check where the tars lie and the index will. Return the index's `base`.

    Raises InputError when the index could not be written or could not be read again.
    """
    place = f"SOURCE {files.redact(tars.folder)}"
    if out.startswith(("http://", "https://")):
        raise InputError(
            f"SOURCE {files.redact(out)}: nothing can be written over http: {_ELSEWHERE}"
        )
    for name in tars.names:
        names.check_path(name, place, "rename it")
    base = "" if same_place(out, tars.folder) else _absolute(tars.folder)
    scheme = base.partition("://")[0] if "://" in base else "file"
    if base and ("::" in base or scheme not in names.SCHEMES):
        known = ", ".join(names.SCHEMES)
        raise InputError(
            f"{place}: an {index.NAME} elsewhere can't name this place, only a path without `::`, "
            f"or URLs that begin with {known}: leave out --out"
        )
    if user_info(base):
        raise InputError(
            f"{place}: holds a password, which {index.NAME} would tell: download the tars"
        )
    _check_standing(out, base)
    if base or files.exists(tars.folder):  # No folder is made of a mistyped path.
        _check_writable(out)
    return base


def _check_standing(out: str, base: str) -> None:
    """Raise InputError if `out` holds the index of shards that stand there, and not of the tars."""
    document: Any = None
    with contextlib.suppress(OSError, InputError):
        document = index.read_document(out)
    if base and isinstance(document, dict) and not document.get("base"):
        raise InputError(
            f"--out {files.redact(out)}: holds the {index.NAME} of the shards that lie there: "
            "choose another --out, or remove it"
        )


def _check_writable(out: str) -> None:
    try:
        kept_scans.begin(out)
    except OSError as error:
        raise InputError(f"{error}; {_ELSEWHERE}") from None


def _tell_damaged(
    damaged: list[Damaged],
    number: int,
    skip: bool,
    left_out: Reasons,
    report: Callable[[str], None],
) -> None:
    """Report all damaged tars. Raise InputError unless they may be skipped and others are left."""
    if not damaged:
        return
    if skip or len(damaged) > 1:
        tell_each(
            [f"{tar.url}: {tar.reason} ({tar.samples:,} samples before that)" for tar in damaged],
            report,
        )
    if not skip or len(damaged) == number:
        skippable = "" if len(damaged) == number else ", or use --skip-damaged"
        raise InputError(
            f"SOURCE {damaged[0].url}: {damaged[0].reason}: {len(damaged):,} of {number:,} tars "
            f"{'is' if len(damaged) == 1 else 'are'} damaged or missing: restore "
            f"{'it' if len(damaged) == 1 else 'them'}{skippable}"
        )
    lost = sum(tar.samples for tar in damaged)
    reason = "damaged or missing tars" + f", with at least {lost:,} samples" * bool(lost)
    leave_out(left_out, reason, damaged[0].url.rpartition("/")[2], len(damaged))


def _scan_once(folder: str, name: str, layout: Layout, out: str, stop: Event) -> Scan | Damaged:
    """Scan a tar, unless a call before this one has done it."""
    url, place = files.join(folder, name), files.redact(files.join(folder, name))
    starts = array("q")
    try:
        check_is_file(url)
        version = kept_scans.read_version(url)
        if known := kept_scans.find_kept(name, version, layout, out):
            return known
        with open_skim(url) as file:
            found = _scan(file, name, layout, starts, stop)
    except FileNotFoundError:
        return Damaged(place, NOT_THERE + PATTERN_HINT * bool(set(name) & set("*?")), 0)
    except TarError as error:
        hint = " (`python launch/pack.py SOURCE OUT` takes the last of them)"
        hint *= isinstance(error, FieldTwice)
        return Damaged(place, f"damaged: {error}{hint}", len(starts))
    kept_scans.keep(found, layout, version, out)
    return found


def _scan(file: BinaryIO, name: str, layout: Layout, starts: "array[int]", stop: Event) -> Scan:
    """Do what `scan_tar` does. When it raises TarError, say what stands in the place of a tar."""
    try:
        return scan_tar(file, name, layout, starts, stop)
    except TarError as error:
        file.seek(0)
        if find_compression(file):
            raise TarError(f"it is compressed, and {_REPACKS} it") from None
        file.seek(0)
        fault = find_fault(file.read(BLOCK))
        if fault.startswith(("a ", "an ")) and not starts:
            raise TarError(f"{error}, it is {fault}") from None
        raise


def _known_classes(url: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError, InputError):
        return index.class_names(index.read_document(url))
    return []


def _known_pixels(url: str) -> dict[str, Any]:
    """Return the options by which packing converted the images, if there is an index of them."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, InputError):
        document = index.read_document(url)
        found = document.get("pixels") if isinstance(document, dict) else None
        return found if isinstance(found, dict) else {}
    return {}


def _keep_records(made: Index, folder: str) -> None:
    """Keep what packing recorded of shards that are still the same: the CRCs, and its plan."""
    try:
        standing = index.load(folder, "SOURCE")
    except (InputError, OSError):
        return
    crcs = {(s.name, s.samples, s.bytes, s.checksum): s.crcs for s in standing.shards}
    found = [(s.name, s.samples, s.bytes, s.checksum) for s in made.shards]
    for shard, key in zip(made.shards, found, strict=True):
        shard.crcs = crcs.get(key)
    if found == list(crcs):
        made.plan = standing.plan


def _absolute(url: str) -> str:
    """Return a URL that means the same from any working directory."""
    return os.path.abspath(url) if "://" not in url else url.rstrip("/")


def _doubts(labels: Labels, scans: list[Scan]) -> list[str]:
    """Warn of labels that are missing, and of an order by class."""
    numbers = labels.numbers
    missing = int((numbers < 0).sum())
    if missing == len(numbers):
        return [_hint_at_labels(scans), *_doubts_about_tars(scans)]
    doubts = [f"{missing:,} of {len(numbers):,} samples have no label"] if missing else []
    if not labels.named and numbers[numbers >= 0].min() == 1:
        doubts.append("the labels begin at 1, and class 0 has no sample: are they counted from 1?")
    if _looks_sorted(numbers):
        doubts.append(
            "the samples look sorted by class. Training reads blocks of about "
            f"{index.BLOCK_BYTES >> 20} MB of consecutive samples, so a batch would hold few "
            "classes: repack the images with `python launch/pack.py SOURCE OUT`, which shuffles"
        )
    return doubts + _doubts_about_tars(scans)


def _doubts_about_tars(scans: list[Scan]) -> list[str]:
    """Warn of splits that lie together, of repeated names, and of blocks that are too large."""
    doubts = []
    folders = sorted({folder for found in scans for folder in found.folders})
    if len({split_name(folder) for folder in folders} - {None}) > 1:
        names = " and ".join(folder for folder in folders if split_name(folder))
        doubts.append(
            f"the folders {names} in the tars look like splits, and would be one data set: "
            f"{_REPACKS} each alone"
        )
    if repeated := sum(found.twice for found in scans):
        example = next(found.shard.name for found in scans if found.twice)
        doubts.append(
            f"samples whose name comes again in their tar, as after `tar -r`: {repeated:,}, "
            f"such as in {example} (`python launch/pack.py SOURCE OUT` takes the last of them)"
        )
    largest = max(scans, key=lambda found: found.largest)
    if largest.largest > _LARGE:
        doubts.append(
            f"{largest.shard.name} has a block of {largest.largest / 1e6:,.0f} MB, and training "
            "holds several blocks for each stream. If other fields than the images take these "
            "bytes, `python launch/pack.py SOURCE OUT` leaves them away"
        )
    return doubts


def _hint_at_labels(scans: list[Scan]) -> str:
    """Say that no sample has a label, and where labels may be."""
    others = Counter(name for found in scans for name in found.fields)
    where = [
        f"the field {name} may hold them (--label {name}{':KEY' * (name == 'json')})"
        for name in others
        if name.rpartition(".")[2] in ("json", "txt", "text", "label", "class", "cls", "caption")
    ]
    if len(scans) > 1:
        where.append("the tars may be one for each class (repack with --classes-from tars)")
    return "the samples have no labels" + "".join(f"; {hint}" for hint in where)


def _looks_sorted(labels: NDArray[np.int64]) -> bool:
    """Return whether neighbors share their class much more often than in a random order."""
    labels = labels[labels >= 0]
    if len(labels) < 2:
        return False
    shuffled = float(((np.bincount(labels) / len(labels)) ** 2).sum())
    found = float((labels[1:] == labels[:-1]).mean())
    return shuffled < 1 and found > (1 + shuffled) / 2
