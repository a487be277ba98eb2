"""Unpack compressed tars, of which no parts can be read."""

import bz2
import contextlib
import gzip
import importlib
import lzma
import shutil
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from shards.errors import InputError
from shards.storage import files
from shards.tar import TarError

_OPENERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_ZSTD = b"\x28\xb5\x2f\xfd"


def unpack(url: str, path: str) -> None:
    """Unpack a compressed tar to a local file.

    Raises FileNotFoundError, TarError when the content is damaged, and InputError when this Python
    cannot unpack it.
    """
    with files.open_reader(url) as file, _open(file, url) as plain, open(path, "wb") as out:
        try:
            shutil.copyfileobj(plain, out, 1 << 20)
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, ValueError) as error:
            raise TarError(f"cannot be unpacked: {error}") from None


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
