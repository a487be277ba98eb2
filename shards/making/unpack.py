"""Unpack compressed tars, of which no parts can be read.

Parquet files are unpacked too, by shards/making/parquet.py. Zip files are not, because each image
in them is compressed alone: see shards/making/zips.py.
"""

import bz2
import contextlib
import gzip
import importlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any, BinaryIO

from shards.errors import InputError
from shards.storage import files, space
from shards.tar import TarError

_OPENERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_ZSTD = b"\x28\xb5\x2f\xfd"
PARQUET_MARK = b"PAR1"


def find_compression(file: BinaryIO) -> bytes:
    """Return the first bytes by which a compressed file is known, whatever its name is, or b""."""
    marks = (*_OPENERS, _ZSTD, PARQUET_MARK)
    start = file.read(len(max(marks, key=len)))
    return next((mark for mark in marks if start.startswith(mark)), b"")


@contextlib.contextmanager
def naming_temporary(url: str, folder: str) -> Iterator[None]:
    """Turn an error of a full disk, to which `url` is unpacked, into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in space.FULL:
            raise
        raise InputError(
            f"SOURCE {files.redact(url)}: there is no room to unpack it to {folder}: set TMPDIR to "
            "a folder with more room"
        ) from None


def unpack(url: str, path: str, stop: Event) -> None:
    """Unpack a compressed tar to a local file, but end early when `stop` is set.

    Raises FileNotFoundError, TarError when the content is damaged, InputError when this Python
    cannot unpack it, and OSError when the disk is full.
    """
    with files.open_reader(url) as file, _open(file, url) as plain, open(path, "wb") as out:
        while not stop.is_set() and (piece := _read_piece(plain, url)):
            out.write(piece)


def _read_piece(plain: Any, url: str) -> bytes:
    try:
        piece: bytes = plain.read(1 << 20)
    except _damages() as error:
        # A failure of the store names the URL, and the unpackers' own name nothing.
        if isinstance(error, OSError) and (error.errno or files.redact(url) in str(error)):
            raise
        raise TarError(f"cannot be unpacked: {error}") from None
    return piece


def _damages() -> tuple[type[Exception], ...]:
    """Return what the unpackers raise for content that is damaged."""
    kinds = [OSError, EOFError, ValueError, lzma.LZMAError, zlib.error]
    with contextlib.suppress(ImportError):
        kinds.append(importlib.import_module("compression.zstd").ZstdError)
    return tuple(kinds)


@contextlib.contextmanager
def _open(file: BinaryIO, url: str) -> Iterator[Any]:
    start = file.read(6)
    file.seek(0)
    if start.startswith(_ZSTD):
        try:
            zstd = importlib.import_module("compression.zstd")
        except ImportError:
            raise InputError(
                f"SOURCE {files.redact(url)}: Python reads zstd from 3.14 on: unpack the tar with "
                "`zstd -d` first"
            ) from None
        opener = zstd.open
    else:
        opener = next((known for mark, known in _OPENERS.items() if start.startswith(mark)), None)
    if opener is None:
        yield file  # Its name says that it is compressed, but it is not.
        return
    with opener(file) as plain:
        yield plain
