"""Find the samples in a tar by WebDataset's grouping of members, without extracting anything.

Consecutive files whose paths are equal up to the first dot of the base name are one sample. What
follows the dot, in lower case, is the field: `dir/0007.jpg`, `dir/0007.cls`.

This module parses the headers itself, in a quarter of the time that the standard library's tarfile
takes. tarfile takes 24 us for each member. For the two members of a sample, that would add a third
to the time it takes to decode and crop a 32-pixel image.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

BLOCK = 512  # A header has this many bytes, and contents are padded to a multiple of it.
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
LABEL_FIELD = "cls"

_NAME = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]*)$")


@dataclass
class Sample:
    """The members of one sample, as byte ranges of the file that was read.

    `start` is the offset of the sample's first header. The bytes from one sample's start to
    another's hold whole samples, so one range read can fetch them. `fields` maps a field to the
    (offset, size) of its content, in bytes.
    """

    key: str
    start: int
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def image(self) -> tuple[int, int] | None:
        """(offset, size) of the image, or None when the sample holds none."""
        return next((self.fields[name] for name in IMAGE_FIELDS if name in self.fields), None)

    @property
    def label(self) -> tuple[int, int] | None:
        return self.fields.get(LABEL_FIELD)


class TarError(ValueError):
    """The bytes are not complete tar members that start at a header."""


class Member(NamedTuple):
    """A regular file in a tar, as byte ranges of the file that was read."""

    name: str
    start: int  # byte offset of its first header
    content: int  # byte offset of its content
    size: int  # length of its content in bytes


def read_members(file: BinaryIO, *, whole: bool = False) -> Iterator[Member]:
    """Yield the regular files of a tar, or of a piece that begins at a header, in file order.

    The function understands ustar, GNU long names, and PAX paths and sizes, as `tarfile` and `tar`
    write them. It skips contents by seeking. Raises TarError when a header is damaged or the file
    ends inside a member.

    Args:
        whole: Also raise TarError when the file ends without the end mark of a tar.
    """
    end = file.seek(0, io.SEEK_END)
    offset = start = 0
    # An extended header describes the next member. These hold its name and size until then.
    name: str | None = None
    size: int | None = None
    while offset < end:
        file.seek(offset)
        header = file.read(BLOCK)
        if not any(header):
            return
        kind = header[156:157]
        length = _header_size(header, offset) if size is None else size
        content = offset + BLOCK
        following = content + -(-length // BLOCK) * BLOCK
        if following > end:
            raise TarError(f"it ends at byte {end}, inside the member at byte {offset}")
        if kind in (b"x", b"L"):
            extended = file.read(length)
            if kind == b"L":
                name = extended.rstrip(b"\0").decode(errors="replace")
            else:
                records = _pax_records(extended, offset)
                name = records.get("path", name)
                size = _pax_size(records["size"], offset) if "size" in records else size
        else:
            if kind in (b"0", b"\0"):
                yield Member(name or _header_name(header), start, content, length)
            start, name, size = following, None, None
        offset = following
    if whole:
        raise TarError(f"it ends at byte {end}, without the end mark of a tar")


def _header_size(header: bytes, offset: int) -> int:
    """Return the member's size in bytes.

    Raises TarError when the header's checksum, which covers all bytes but its own, is wrong.
    """
    try:
        total = int(header[148:156].rstrip(b" \0"), 8)
        if len(header) < BLOCK or total != sum(header) - sum(header[148:156]) + 8 * 32:
            raise ValueError
        if header[124] & 0x80:  # Sizes of 8 GiB and more are in base 256.
            return int.from_bytes(header[125:136], "big")
        return _natural(header[124:136].rstrip(b" \0") or b"0", 8)
    except ValueError:
        raise TarError(f"no tar header at byte {offset}") from None


def _natural(text: bytes | str, base: int) -> int:
    """Parse a number. Raises ValueError when it is negative or not a number."""
    number = int(text, base)
    if number < 0:
        raise ValueError(text)
    return number


def _pax_size(text: str, offset: int) -> int:
    try:
        return _natural(text, 10)
    except ValueError:
        raise TarError(f"damaged PAX header at byte {offset}") from None


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode(errors="replace")


def _pax_records(content: bytes, offset: int) -> dict[str, str]:
    """Parse lines of the form `LENGTH KEY=VALUE`, where LENGTH counts the bytes of the line."""
    records, position = {}, 0
    try:
        while position < len(content):
            length = int(content[position : content.index(b" ", position)])
            line = content[position : position + length].decode(errors="replace")
            key, _, value = line.split(" ", 1)[1].rstrip("\n").partition("=")
            records[key] = value
            position += max(1, length)
    except (ValueError, IndexError):
        raise TarError(f"damaged PAX header at byte {offset}") from None
    return records


def read_samples(file: BinaryIO, *, whole: bool = False) -> Iterator[Sample]:
    """Yield the samples of a tar, or of a piece that begins at a sample's start, in file order.

    Raises TarError when `read_members` does, and when a sample has the same field twice.
    """
    sample: Sample | None = None
    for member in read_members(file, whole=whole):
        match = _NAME.match(member.name)
        if match is None:
            continue
        key, name = match[1], match[2].lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key, member.start)
        if name in sample.fields:
            raise TarError(f"member {member.name!r} stands twice in one sample")
        sample.fields[name] = (member.content, member.size)
    if sample is not None:
        yield sample


class Block:
    """Consecutive samples of a shard, fetched as one byte range and held in memory."""

    def __init__(self, content: bytes) -> None:
        """Parse the bytes of a block. Raises TarError when they are not whole samples."""
        self.content = bytearray(content)  # Tensors can view writable bytes without a copy.
        self.samples = [sample for sample in read_samples(io.BytesIO(content)) if sample.image]

    def __len__(self) -> int:
        return len(self.samples)

    def label(self, position: int) -> int:
        """Return the class index of a sample, or -1 when it has none that is a number."""
        span = self.samples[position].label
        if span is None:
            return -1
        return parse_label(bytes(self.content[span[0] : span[0] + span[1]]))


def parse_label(text: bytes) -> int:
    """Parse the decimal class index in a `.cls` member. Return -1 for anything else."""
    text = text.strip()
    return int(text) if text.isdigit() and len(text) < 18 else -1
