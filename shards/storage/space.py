"""Say how much a write needed and how much there was, when a local disk is full."""

import errno
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NEEDED = "needed at least"


@contextmanager
def naming_space(path: str, needed: Callable[[], int], place: str | None = None) -> Iterator[None]:
    """Replace an error of a full disk in the block by one that names the space.

    Put it around the block that removes a half-written file, so that the free space includes what
    that file took. Other errors pass unchanged.

    Args:
        path: The file that is written.
        needed: Returns the number of bytes that were to be written.
        place: Stands first in the error's text. By default the caller names the place, and the
            error keeps its number.
    """
    try:
        yield
    except OSError as error:
        if (number := _find_number(error)) is None:
            raise
        text = _describe(number, path, needed())
        raise (OSError(f"{place}: {text}") if place else OSError(number, text)) from error


def is_full(error: BaseException) -> bool:
    """Return whether an error, or the one that caused it, is that of a full disk."""
    return _find_number(error) is not None


def format_size(size: float) -> str:
    """Write a number of bytes in the unit that suits it: 512 bytes, 1.5 kB, 20.0 MB, 3.2 GB."""
    if size < 1000:
        return f"{size:.0f} bytes"
    for unit in ("kB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:,.1f} GB"


def name_whole(text: str, what: str, size: int) -> str:
    """Return a message of a full disk that tells what the whole of several files needs.

    By itself it tells the size of one of them. Other messages are returned as they are.
    """
    needed = rf"{_NEEDED} [0-9.,]+ (?:bytes|kB|MB|GB)"
    return re.sub(needed, f"{what} needs {format_size(size)}", text)


def _find_number(error: BaseException | None) -> int | None:
    """Find the errno of a full disk in an error or in those that it was made of."""
    for _ in range(10):
        if isinstance(error, OSError) and error.errno in FULL:
            return error.errno
        if error is None:
            return None
        error = error.__cause__ or error.__context__
    return None


def _describe(number: int, path: str, needed: int) -> str:
    text = f"{os.strerror(number)}; {_NEEDED} {format_size(needed)}"
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if number == errno.EFBIG:
        known = limit != resource.RLIM_INFINITY
        return f"{text}, allowed for a file {format_size(limit)} (ulimit -f)" if known else text
    folder = path
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    disk = os.statvfs(folder)
    text = f"{text}, free {format_size(disk.f_bavail * disk.f_frsize)}"
    if number == errno.EDQUOT:
        return f"{text}, but the quota is used up"
    return f"{text}, but no more files fit" if disk.f_files and not disk.f_favail else text
