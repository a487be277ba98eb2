"""Bytes in and out of any fsspec URL: local paths, s3://, gs://, memory:// and the rest."""

import contextlib
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from shards.errors import InputError

_T = TypeVar("_T")

ATTEMPTS = 5
BACKOFF = 0.2  # seconds before the first retry; doubles each time, with jitter
READ_BLOCK = 4 << 20  # bytes that `open_reader` asks an object store for at a time

_PERMANENT = (
    *(FileNotFoundError, FileExistsError, PermissionError),
    *(IsADirectoryError, NotADirectoryError),
)


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of `url` and the path inside it. Raises InputError if unknown."""
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{redact(url)}: no storage for this URL: {error}") from None
    return filesystem, path


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def redact(url: str) -> str:
    """The URL without what may be secret: user and password, query. Plain paths stay whole."""
    return re.sub(r"(?<=://)[^/@]*@", "", url).split("?")[0] if "://" in url else url


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def read(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes [start, stop) of an object, the whole of it by default.

    Raises FileNotFoundError at once, and OSError naming the URL after a bounded number of retries.
    """
    filesystem, path = open_filesystem(url)
    content: bytes = _retry(url, lambda: filesystem.cat_file(path, start=start, end=stop))
    return content


def open_reader(url: str) -> BinaryIO:
    """A seekable file; remote ones are read in large blocks, the last few of which are kept.

    Raises FileNotFoundError.
    """
    filesystem, path = open_filesystem(url)
    keep: dict[str, Any] = {"cache_type": "blockcache", "cache_options": {"maxblocks": 4}}
    options = {} if is_local(url) else {"block_size": READ_BLOCK} | keep
    return cast(BinaryIO, _retry(url, lambda: filesystem.open(path, "rb", **options)))


def write(url: str, content: bytes) -> None:
    """Write an object whole or not at all: one PUT, or a rename on a local disk.

    A local file's folders are made when they are missing.
    """
    filesystem, path = open_filesystem(url)

    def put() -> None:
        if not is_local(url):
            filesystem.pipe_file(path, content)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.partial", "wb") as file:
            file.write(content)
        os.replace(f"{path}.partial", path)

    _retry(url, put)


def create(url: str, content: bytes) -> bool:
    """Write an object that does not exist yet; False when it does, and then nothing is written.

    Of many that try at once one succeeds. `content` must be like no other's: when an answer got
    lost, it tells whether the object that stands there is this call's.
    """
    filesystem, path = open_filesystem(url)

    def put() -> None:
        if not is_local(url):
            filesystem.pipe_file(path, content, mode="create")
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), suffix=".partial") as file:
            file.write(content)
            file.flush()
            os.link(file.name, path)

    try:
        _retry(url, put)
    except FileExistsError:
        return read(url) == content
    return True


def exists(url: str) -> bool:
    filesystem, path = open_filesystem(url)
    return bool(_retry(url, lambda: filesystem.exists(path)))


def size(url: str) -> int:
    """Length of an object in bytes. Raises FileNotFoundError."""
    filesystem, path = open_filesystem(url)
    return int(_retry(url, lambda: filesystem.size(path)))


def list_names(url: str) -> list[str]:
    """Names directly under a folder, sorted; empty when it does not exist."""
    filesystem, path = open_filesystem(url)
    filesystem.invalidate_cache()
    try:
        found = _retry(url, lambda: filesystem.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return sorted(name for entry in found if (name := entry.rstrip("/").rsplit("/", 1)[-1]))


def walk(url: str) -> Iterator[tuple[str, int]]:
    """(path relative to the folder, bytes) of all files below it, in no order; links followed."""
    filesystem, path = open_filesystem(url)
    if is_local(url):
        # fsspec's own listing takes twice as long, and does not follow links to folders.
        for folder, _, names in os.walk(path, followlinks=True):
            below = folder[len(path) :].lstrip("/")
            for name in names:
                size = os.stat(f"{folder}/{name}").st_size
                yield f"{below}/{name}" if below else name, size
        return
    filesystem.invalidate_cache()
    for file, info in _retry(url, lambda: filesystem.find(path, detail=True)).items():
        yield file.removeprefix(path).lstrip("/"), info["size"]


def remove(url: str) -> None:
    """Delete an object or a folder with all it holds; nothing happens if it is not there."""
    filesystem, path = open_filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        _retry(url, lambda: filesystem.rm(path, recursive=True))


def _retry(url: str, call: Callable[[], _T]) -> _T:
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except _PERMANENT:
            raise
        except Exception as error:  # botocore's and aiohttp's are no OSErrors
            if attempt == ATTEMPTS - 1:
                reason = str(error).replace(url, redact(url))
                raise OSError(f"{redact(url)}: gave up after {ATTEMPTS} tries: {reason}") from error
            time.sleep(BACKOFF * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")
