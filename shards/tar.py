"""Find the members of a tar by its headers, without extracting anything.

This module parses the headers itself, in a quarter of the time that the standard library's tarfile
takes. tarfile takes 24 us for each member. For the two members of a sample, that would add a third
to the time it takes to decode and crop a 32-pixel image.
"""

import io
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512  # A header has this many bytes, and contents are padded to a multiple of it.

# The types of members, each one byte. The last name those that only have a header.
_FILES, _LINKS, _FOLDER, _EXTENSIONS = b"0\x007", b"12", b"5", b"xLKg"
_WITHOUT_CONTENT = b"123456"


class TarError(ValueError):
    """The bytes are not complete tar members that start at a header."""


class Member(NamedTuple):
    """A member of a tar that is no folder, as byte ranges of the file that was read."""

    name: str
    start: int  # byte offset of its first header
    content: int  # byte offset of its content
    size: int  # length of its content in bytes
    link: str = ""  # For a hard or symbolic link: the name that it gives.
    special: bool = False  # Its content is not that of a file: a device, a pipe, a sparse file.


def read_members(file: BinaryIO, *, whole: bool = False) -> Iterator[Member]:
    """Yield the members of a tar, or of a piece that begins at a header, in file order.

    The function understands ustar, GNU long names, and PAX paths and sizes, as `tarfile` and `tar`
    write them. It skips contents by seeking. Raises TarError when a header is damaged or the file
    ends inside a member.

    Args:
        whole: Also raise TarError when the file ends without the end mark of a tar.
    """
    end = file.seek(0, io.SEEK_END)
    offset = start = 0
    # An extended header describes the next member. These hold what it says until then.
    said: dict[str, str] = {}
    while offset < end:
        file.seek(offset)
        header = file.read(BLOCK)
        if not any(header):
            return
        kind = header[156:157]
        length = _header_size(header, offset)
        if "size" in said and kind not in _EXTENSIONS:
            length = _pax_size(said["size"], offset)
        content = offset + BLOCK
        # Links may give the size of their target, which does not follow.
        padded = 0 if kind in _WITHOUT_CONTENT else -(-length // BLOCK) * BLOCK
        if content + padded > end:
            raise TarError(f"it ends at byte {end}, inside the member at byte {offset}")
        offset, header_at = content + padded, offset
        if kind in _EXTENSIONS:
            said |= _read_extension(kind, file, length, header_at)
            continue
        if kind != _FOLDER:
            name = said.get("path") or _header_name(header)
            link = said.get("linkpath") or _text(header[157:257]) if kind in _LINKS else ""
            special = kind not in _FILES + _LINKS or any("GNU.sparse" in key for key in said)
            yield Member(name, start, content, 0 if link else length, link, special)
        start, said = offset, {}
    if whole:
        raise TarError(f"it ends at byte {end}, without the end mark of a tar")


def _read_extension(kind: bytes, file: BinaryIO, length: int, offset: int) -> dict[str, str]:
    """Return what an extended header says about the next member."""
    if kind == b"g":  # It speaks of all members, and so of none's name or size.
        return {}
    content = file.read(length)
    if kind == b"x":
        return _pax_records(content, offset)
    return {"path" if kind == b"L" else "linkpath": _text(content)}


def _text(content: bytes) -> str:
    return content.split(b"\0", 1)[0].decode(errors="replace")


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
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


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
