"""Make an index for tars that others made, by reading their headers and labels once."""

import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards import index
from shards.blocks import check_blocks, checksum
from shards.documents import Natural, build
from shards.errors import InputError
from shards.index import Index, Shard
from shards.making.image_folders import PATTERN_HINT
from shards.making.labels import Labels, number_labels
from shards.making.left_out import LeftOut, Reasons, explain, leave_out, merge
from shards.making.pack import describe, run_in_threads
from shards.making.tars import Tars
from shards.samples import Layout, Sample, group_samples, match_name
from shards.storage import files
from shards.storage.skim import open_skim
from shards.tar import Member, TarError, read_members

REMOTE_THREADS = 4  # Times as many tars are scanned at once, because each waits for its answers.

_WORK = ".index"  # This folder holds what was found so far, for the next call to go on from.
_REPACK = "`python launch/pack.py SOURCE OUT` repacks them"
NOT_THERE = "not there"


class Damaged(NamedTuple):
    """A tar that cannot be read to its end."""

    url: str
    reason: str
    samples: int  # that were found before the damage


class Scan(NamedTuple):
    """What a tar holds."""

    shard: Shard
    labels: list[str]  # the text of each sample's label, "" without one
    left_out: Reasons
    fields: list[str]  # of its first sample


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
    _check_writable(out)

    def scan(name: str) -> Scan | Damaged:
        found = _scan_once(tars.folder, name, layout, out)
        advance(0 if isinstance(found, Damaged) else found.shard.bytes)
        return found

    if not files.is_local(tars.folder):
        threads *= REMOTE_THREADS
    results = run_in_threads(scan, tars.names, threads)
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
    base = "" if _same_place(out, tars.folder) else _absolute(tars.folder)
    made = Index(out, [found.shard for found in scans], labels.classes, base=base)
    made.layout = replace(layout, named=labels.named)
    made.pixels = _known_pixels(tars.folder)
    return Indexed(made, left_out, labels.warnings + _doubts(labels, scans))


def save(indexed: Indexed, report: Callable[[str], None]) -> None:
    """Write the index, and remove what was kept for it."""
    indexed.made.save()
    url = indexed.made.url
    files.discard(files.join(url, _WORK), url, report)


def _check_writable(out: str) -> None:
    place = f"SOURCE {files.redact(out)}"
    hint = f"write {index.NAME} elsewhere with --out URL"
    if out.startswith(("http://", "https://")):
        raise InputError(f"{place}: nothing can be written over http: {hint}")
    try:
        files.write(files.join(out, _WORK, "begun"), b"")
    except OSError as error:
        raise InputError(f"{error}; {hint}") from None


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
    for tar in damaged if skip or len(damaged) > 1 else []:
        report(f"{tar.url}: {tar.reason} ({tar.samples:,} samples before that)")
    if not skip or len(damaged) == number:
        skippable = "" if len(damaged) == number else ", or leave them out with --skip-damaged"
        raise InputError(
            f"SOURCE {damaged[0].url}: {damaged[0].reason}: {len(damaged):,} of {number:,} tars "
            f"are damaged or missing: restore them{skippable}"
        )
    lost = sum(tar.samples for tar in damaged)
    reason = f"damaged or missing tars, with at least {lost:,} samples"
    leave_out(left_out, reason, damaged[0].url.rpartition("/")[2], len(damaged))


def _scan_once(folder: str, name: str, layout: Layout, out: str) -> Scan | Damaged:
    """Scan a tar, unless a call before this one has done it."""
    url, record = files.join(folder, name), files.join(out, _WORK, f"{name}.json")
    # A damaged record counts as no record, and the tar is scanned again.
    with contextlib.suppress(FileNotFoundError, ValueError, InputError):
        return _from_record(files.read_json(record), files.size(url), name, layout)
    place = files.redact(url)
    samples: list[Sample] = []
    try:
        with open_skim(url) as file:
            found = _scan(file, name, layout, samples)
    except FileNotFoundError:
        return Damaged(place, NOT_THERE + PATTERN_HINT * bool(set(name) & set("*?")), 0)
    except TarError as error:
        return Damaged(place, f"damaged: {error}", sum(1 for sample in samples if sample.image))
    files.write(record, json.dumps(_record(found, layout)).encode())
    return found


def _scan(file: Any, name: str, layout: Layout, samples: list[Sample]) -> Scan:
    """Read the headers and labels of a tar, and append its samples to `samples`."""
    labels: list[str] = []
    keys: set[str] = set()
    left_out: Reasons = {}
    first: list[str] = []

    def note(member: Member) -> Member:
        if match_name(member.name, layout) is None:
            leave_out(left_out, "members without a field in their name", f"{name}: {member.name}")
        return member

    for sample in group_samples(map(note, read_members(file, whole=True)), layout):
        if not sample.image:
            samples.append(sample)
            continue
        text = ""
        if sample.label is not None:
            file.seek(sample.label[0])
            text = layout.read_label(file.read(sample.label[1]))
        first = first or list(sample.fields)
        keys.add(sample.key)
        samples.append(sample)
        labels.append(text)
    for sample in samples:
        if not sample.image:
            leave_out(left_out, _reason_against(sample, layout, keys), f"{name}: {sample.key}")
    size = file.seek(0, io.SEEK_END)
    return Scan(describe(name, samples, size), labels, left_out, first)


def _reason_against(sample: Sample, layout: Layout, keys: set[str]) -> str:
    """Return why a sample without an image is left out, and what would mend that."""
    fields = sorted([*sample.fields, *sample.empty])
    shown = ", ".join(fields[:5]) + ", ..." * (len(fields) > 5)
    if sample.empty and layout.image_field(fields):
        return f"samples whose image is a link or no plain file ({_REPACK})"
    if sample.key in keys:
        return f"samples whose image stands elsewhere in the tar, with fields {shown} ({_REPACK})"
    if len(layout.image_fields(fields)) > 1:
        return (
            "samples with several images and dots in their names (use --dotted if the dots belong "
            "to the names, or name the image's field with --image)"
        )
    if set(fields) <= {"tar"}:
        return "tars inside of a tar (extract them, or repack with --classes-from tars)"
    return f"samples without an image, with fields {shown} (name the image's field with --image)"


def _record(found: Scan, layout: Layout) -> dict[str, Any]:
    shard = found.shard
    assert shard.blocks is not None
    texts = sorted(set(found.labels))
    places = {text: i for i, text in enumerate(texts)}
    return {
        "layout": asdict(layout),
        "bytes": shard.bytes,
        "blocks": shard.blocks.tolist(),
        "texts": texts,
        "labels": [places[text] for text in found.labels],
        "left_out": found.left_out,
        "fields": found.fields,
    }


@dataclass(frozen=True)
class _Record:
    """What a call writes of a tar that it has scanned."""

    layout: Layout
    bytes: Natural
    blocks: Any
    texts: list[str]
    labels: list[Natural]
    left_out: dict[str, tuple[Natural, str]]
    fields: list[str]


def _from_record(document: object, size: int, name: str, layout: Layout) -> Scan:
    """Return what an earlier call found in a tar.

    Raises ValueError when the tar has changed, and InputError when the record is damaged.
    """
    record = build(_Record, document)
    if record.layout != layout or record.bytes != size:
        raise ValueError(name)
    if any(label >= len(record.texts) for label in record.labels):
        raise ValueError(name)
    blocks = check_blocks(record.blocks, len(record.labels), size, "blocks")
    shard = Shard(name, len(record.labels), size, blocks, checksum(blocks))
    labels = [record.texts[label] for label in record.labels]
    left_out = {why: LeftOut(*found) for why, found in record.left_out.items()}
    return Scan(shard, labels, left_out, record.fields)


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


def _same_place(out: str, folder: str) -> bool:
    return _absolute(out) == _absolute(folder)


def _absolute(url: str) -> str:
    """Return a URL that means the same from any working directory."""
    return os.path.abspath(url) if "://" not in url else url.rstrip("/")


def _doubts(labels: Labels, scans: list[Scan]) -> list[str]:
    """Warn of labels that are missing, and of an order by class."""
    numbers = labels.numbers
    missing = int((numbers < 0).sum())
    if missing == len(numbers):
        return [_hint_at_labels(scans)]
    doubts = [f"{missing:,} of {len(numbers):,} samples have no label"] if missing else []
    if _looks_sorted(numbers):
        doubts.append(
            "the samples look sorted by class. Training reads blocks of about "
            f"{index.BLOCK_BYTES >> 20} MB of consecutive samples, so a batch would hold few "
            "classes: repack the images with `python launch/pack.py SOURCE OUT`, which shuffles"
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
