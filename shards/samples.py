"""Group the members of a tar into samples, by WebDataset's rule, and find image and label.

Consecutive files whose paths are equal up to the first dot of the base name are one sample. What
follows the dot, in lower case, is the field: `dir/0007.jpg`, `dir/0007.cls`.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

from shards.tar import Member, TarError, read_members

PACKED_FIELDS = ("jpg", "jpeg", "png", "webp")  # Packing writes images to these.
EXTENSIONS = (  # of image files in folders
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jfif", "avif"),
    *("jpe", "dib", "pbm", "pnm", "pfm", "jp2", "j2k", "qoi", "tga"),
)
IMAGE_FIELDS = (*PACKED_FIELDS, "jpe", "jfif")
LABEL_FIELD = "cls"
MOST_LABEL_BYTES = 1 << 20  # A field with more than this is not read for a label.
LONGEST_LABEL = 1000  # A longer text, in characters, is no name of a class.


class FieldTwice(TarError):
    """A sample has the same field twice."""


Span = tuple[int, int]  # offset and size of a member's content, in bytes

_FIRST_DOT = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]*)$", re.DOTALL)
_NUMBER = re.compile(r"([+-]?)([0-9]+)(\.0*)?")
_LAST_DOT = re.compile(r"^((?:.*/)?[^/.][^/]*)\.([^/.]*)$", re.DOTALL)


@dataclass(frozen=True)
class Layout:
    """How the members of a data set's tars make samples. `index.json` records it.

    `image` is the field that holds the image. When it is "", that is the first of IMAGE_FIELDS
    that a sample has, or else its only field that ends in one of them, such as `input.jpg`.
    `label` is the field that holds the label, `cls` when it is "". `json:a.b` is the value of `b`
    in `a` of the field `json`. With `dotted`, a field begins at the last dot of a name. With
    `named`, labels are the names of classes; otherwise, they are class indices.
    """

    image: str = ""
    label: str = ""
    dotted: bool = False
    named: bool = False

    def document(self) -> dict[str, Any]:
        """Return the fields that are not the default, as `index.json` holds them."""
        plain = asdict(Layout())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}

    def image_field(self, fields: Iterable[str]) -> str | None:
        """Return the field that holds the image, or None when there is none or several may be."""
        if self.image:
            return self.image if self.image in fields else None
        for name in IMAGE_FIELDS:
            if name in fields:
                return name
        found = self.image_fields(fields)
        return found[0] if len(found) == 1 else None

    @staticmethod
    def image_fields(fields: Iterable[str]) -> list[str]:
        """Return the fields that end like an image, such as `input.jpg` and `target.png`."""
        return [name for name in fields if name.rpartition(".")[2] in IMAGE_FIELDS]

    def label_field(self, fields: Iterable[str], image: str) -> str | None:
        """Return the field that holds the label of the image in the field `image`, if any does.

        When the image is in `front.jpg` and there is no `cls`, this is `front.cls`.
        """
        name = self.label.partition(":")[0] or LABEL_FIELD
        with_prefix = f"{image.rpartition('.')[0]}.{name}"
        return next((known for known in (name, with_prefix) if known in fields), None)

    def read_label(self, content: bytes) -> str:
        """Return the text of a label: a number, a class name, or "" when there is none."""
        if len(content) > MOST_LABEL_BYTES:
            return ""
        try:
            text = content.decode().strip().removeprefix("\ufeff")
            if path := self.label.partition(":")[2]:
                text = _find_value(json.loads(text), path)
        except (ValueError, LookupError, TypeError, RecursionError):
            return ""
        return text if len(text) <= LONGEST_LABEL else ""


def _find_value(value: Any, path: str) -> str:
    """Return the text or number at a path such as `a.0.b` in a JSON document, or ""."""
    for name in path.split("."):
        value = value[int(name)] if isinstance(value, list) else value[name]
    return str(value).strip() if type(value) in (str, int, float) else ""


@dataclass
class Sample:
    """The members of one sample, as byte ranges of the file that was read.

    `start` is the offset of the sample's first header. The bytes from one sample's start to
    another's hold whole samples, so one range read can fetch them. `image` is None when the sample
    holds none. `empty` names the fields without content of their own, such as links.
    """

    key: str
    start: int
    fields: dict[str, Span] = field(default_factory=dict)
    empty: dict[str, Member] = field(default_factory=dict)
    image: Span | None = None
    label: Span | None = None
    image_field: str = ""


def read_samples(file: BinaryIO, layout: Layout | None = None) -> Iterator[Sample]:
    """Yield the samples of a tar, or of a piece that begins at a sample's start, in file order.

    Raises TarError when `read_members` does, and FieldTwice when a sample has the same field twice.
    """
    return group_samples(read_members(file), layout or Layout())


def group_samples(members: Iterable[Member], layout: Layout) -> Iterator[Sample]:
    """Group members into samples. Members whose name has no field belong to none.

    Raises FieldTwice when a sample has the same field twice.
    """
    sample: Sample | None = None
    links: Sample | None = None  # The links of another key, which do not end the sample.
    for member in members:
        match = match_name(member.name, layout)
        if match is None:
            continue
        key, name = match
        if member.link or member.special:
            if sample is not None and sample.key == key:
                sample.empty[name] = member
                continue
            if links is None or links.key != key:
                if links is not None:
                    yield links
                links = Sample(key, member.start)
            links.empty[name] = member
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield _find_parts(sample, layout)
            sample = Sample(key, member.start)
            if links is not None and links.key == key:
                sample.empty, links = links.empty, None
        if name in sample.fields:
            raise FieldTwice(f"member {member.name!r} stands twice in one sample")
        sample.fields[name] = (member.content, member.size)
    if links is not None:
        yield links
    if sample is not None:
        yield _find_parts(sample, layout)


def match_name(path: str, layout: Layout) -> tuple[str, str] | None:
    """Return the key and field that a member's name gives, or None for hidden files and others."""
    match = (_LAST_DOT if layout.dotted else _FIRST_DOT).match(path)
    return None if match is None else (match[1], match[2].lower())


def _find_parts(sample: Sample, layout: Layout) -> Sample:
    image = layout.image_field(sample.fields)
    if image is not None:
        sample.image, sample.image_field = sample.fields[image], image
        if (label := layout.label_field(sample.fields, image)) is not None:
            sample.label = sample.fields[label]
    return sample


def parse_index(text: str) -> int | None:
    """Parse a class index, such as `7` or `7.0`. Return -1 for no label, and None for a name.

    A negative number and an empty text mean that there is no label.
    """
    if not text:
        return -1
    if text.isascii() and text.isdigit():  # nearly all labels
        return int(text) if len(text) < 18 else None
    match = _NUMBER.fullmatch(text)
    if match is None or len(match[2]) >= 18:
        return None
    return -1 if match[1] == "-" else int(match[2])


class Block:
    """Consecutive samples of a shard, fetched as one byte range and held in memory."""

    def __init__(
        self,
        content: bytes,
        layout: Layout | None = None,
        class_numbers: Mapping[str, int] | None = None,
    ) -> None:
        """Parse the bytes of a block. Raises TarError when they are not whole samples.

        Args:
            class_numbers: The index of each class name, when the labels are names.
        """
        self._layout, self._class_numbers = layout or Layout(), class_numbers or {}
        self.content = bytearray(content)  # Tensors can view writable bytes without a copy.
        samples = read_samples(io.BytesIO(content), self._layout)
        self.samples = [sample for sample in samples if sample.image]

    def __len__(self) -> int:
        return len(self.samples)

    def label(self, position: int) -> int:
        """Return the class index of a sample, or -1 when it has none."""
        span = self.samples[position].label
        if span is None:
            return -1
        text = self._layout.read_label(bytes(self.content[span[0] : span[0] + span[1]]))
        if self._layout.named:
            return self._class_numbers.get(text, -1)
        number = parse_index(text)
        return -1 if number is None else number
