"""Find the samples, the labels and all the rest in one tar that others made."""

import io
import re
from array import array
from collections.abc import Iterable, Iterator
from threading import Event
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.index import MOST_CLASSES, Shard
from shards.making.left_out import Reasons, leave_out
from shards.making.pack import describe_starts
from shards.samples import MOST_LABEL_BYTES, Layout, Sample, group_samples, match_name
from shards.tar import Member, is_tar, read_members

_REPACK = "`python launch/pack.py SOURCE OUT` repacks them"
_ELSEWHERE = f"samples whose image stands elsewhere in the tar ({_REPACK})"
LINK = f"samples whose image is a link or no plain file ({_REPACK})"
BEYOND = f"members after the end mark of their tar ({_REPACK})"
NO_FIELD = "members without a field in their name"
BAD_LABEL = "labels that can't be used (no text, no such key, or too long)"
_MOST_KINDS = 20  # More reasons than these are taken together.
_EXAMPLES = 1000  # So many keys are kept to find an example among them.


class Stopped(Exception):
    """Another thread's work has failed, so this one's is of no use."""


class Scan(NamedTuple):
    """What a tar holds."""

    shard: Shard
    labels: list[str]  # the text of each sample's label, "" without one
    left_out: Reasons
    fields: list[str]  # of its first sample
    folders: list[str]  # the first two folders in the samples' names, some of them
    twice: int  # samples whose name comes again

    @property
    def largest(self) -> int:
        """The length of its longest block in bytes."""
        assert self.shard.blocks is not None
        return int(np.diff(self.shard.blocks[:, 0], append=self.shard.bytes).max(initial=0))


def scan_tar(file: BinaryIO, name: str, layout: Layout, starts: "array[int]", stop: Event) -> Scan:
    """Read the headers and labels of a tar. Raises Stopped when `stop` is set.

    Append the offset of each sample to `starts`. The memory is small also for millions of samples.
    """
    labels: list[str] = []
    texts: dict[str, str] = {}
    keys = array("q")  # a hash of the key of each sample
    without: dict[str, _Without] = {}  # by reason
    left_out: Reasons = {}
    first: list[str] = []
    folders: set[str] = set()
    found_members = until(stop, read_members(file, whole=True))
    members = _noted(found_members, layout, name, left_out)
    for sample in group_samples(members, layout):
        if not sample.image:
            reason = explain_absence(sample, layout)
            if reason not in without and len(without) >= _MOST_KINDS:
                reason = "samples without an image, with other fields"
            without.setdefault(reason, _Without([], array("q"))).add(sample.key)
            continue
        text = read_label(file, sample, layout, name, left_out)
        first = first or list(sample.fields)
        if "/" in sample.key and len(folders) < _EXAMPLES:
            folders.update(sample.key.split("/")[:-1][:2])
        starts.append(sample.start)
        keys.append(hash(sample.key))
        labels.append(texts.setdefault(text, text))
        if len(texts) > MOST_CLASSES:
            raise InputError(f"SOURCE {name}: more than {MOST_CLASSES:,} different labels")
    known = np.unique(np.array(keys, np.int64))
    for reason, found in without.items():
        found.tell(reason, known, name, left_out)
    size = file.seek(0, io.SEEK_END)
    shard = describe_starts(name, np.array(starts, np.int64), size)
    twice = len(keys) - len(known)
    return Scan(shard, labels, left_out, first, sorted(folders), twice)


class _Without(NamedTuple):
    """The samples that are without an image for one reason."""

    first: list[str]  # the keys of the first of them
    hashes: "array[int]"  # a hash of the key of each

    def add(self, key: str) -> None:
        self.hashes.append(hash(key))
        if len(self.first) < _EXAMPLES:
            self.first.append(key)

    def tell(self, reason: str, known: NDArray[np.int64], tar: str, left_out: Reasons) -> None:
        """Count them, apart from those whose key is also that of a sample with an image.

        Args:
            known: The hashes of the keys of the samples with an image, sorted.
        """
        hashes = np.array(self.hashes, np.int64)
        places = np.searchsorted(known, hashes)
        apart = (np.append(known, 0)[places] == hashes) & (places < len(known)) & (reason != LINK)
        for why, those in ((_ELSEWHERE, apart), (reason, ~apart)):
            if number := int(those.sum()):
                at = min(int(those.argmax()), len(self.first) - 1)
                leave_out(left_out, why, f"{tar}: {self.first[at]}", number)


def until(stop: Event, members: Iterable[Member]) -> Iterator[Member]:
    """Yield members. Raises Stopped when `stop` is set, as after Ctrl-C."""
    for member in members:
        if stop.is_set():
            raise Stopped
        yield member


def _noted(
    members: Iterable[Member], layout: Layout, tar: str, left_out: Reasons
) -> Iterator[Member]:
    """Yield the members that can belong to a sample, and count the others."""
    for member in members:
        if member.beyond:
            shown = member.name or f"byte {member.start}"
            leave_out(left_out, BEYOND, f"{tar}: {shown}")
        elif match_name(member.name, layout) is None:
            leave_out(left_out, NO_FIELD, f"{tar}: {member.name}")
        else:
            yield member


def read_label(file: BinaryIO, sample: Sample, layout: Layout, tar: str, left_out: Reasons) -> str:
    """Return the text of a sample's label, and count a label that can't be used."""
    if sample.label is None:
        return ""
    start, size = sample.label
    file.seek(start)
    content = file.read(min(size, MOST_LABEL_BYTES + 1))
    text = layout.read_label(content)
    if not text and content.strip():
        leave_out(left_out, BAD_LABEL, f"{tar}: {sample.key}")
    return text


def explain_absence(sample: Sample, layout: Layout) -> str:
    """Return why a sample without an image is left out, and what would mend that."""
    fields = sorted([*sample.fields, *sample.empty])
    # A number before the last dot tells samples apart, and not kinds of samples.
    shown = ", ".join(re.sub(r"\d+(?=.*\.)", "0", name) for name in fields[:5])
    shown += ", ..." * (len(fields) > 5)
    if sample.empty and layout.image_field(fields):
        return LINK
    if len(layout.image_fields(fields)) > 1:
        return (
            "samples with several images and dots in their names (use --dotted if the dots belong "
            "to the names, or name the image's field with --image)"
        )
    if all(is_tar(f".{name}") for name in fields):
        return "tars inside of a tar (extract them, or repack with --classes-from tars)"
    return f"samples without an image, with fields {shown} (name the image's field with --image)"
