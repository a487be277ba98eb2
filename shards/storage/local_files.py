"""Write, list and remove files on a local disk.

A file is either complete or absent, except where `create` says otherwise. The functions work on
file systems without hard links or fsync too. Paths are used literally, without pattern matching.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from shards.errors import InputError
from shards.storage.failures import FULL
from shards.storage.space import naming_space


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


@contextlib.contextmanager
def new_file(path: str) -> Iterator[tuple[BinaryIO, str]]:
    """Yield a new file beside `path`, and its name, which is unique to this call.

    The file is deleted when the block ends, unless it was renamed.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    name = f"{path}.{secrets.token_hex(6)}.partial"
    try:
        with open(name, "xb") as file:
            yield file, name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def write(path: str, content: bytes) -> None:
    """Write a file and rename it to `path`, replacing what was there. Raises OSError."""
    with naming_space(path, lambda: len(content)), new_file(path) as (file, name):
        file.write(content)
        file.close()
        os.replace(name, path)


def append(path: str, content: bytes) -> None:
    """Append to a file, which is created if it is missing. Raises OSError that names the file."""
    with naming_space(path, lambda: len(content), path), open(path, "ab") as file:
        file.write(content)


def create(path: str, content: bytes) -> None:
    """Create a file that does not exist yet. When several processes try at once, one succeeds.

    exFAT, SMB and FUSE have no hard links. There, others may see the file before it is complete.
    Raises FileExistsError when the file exists, and OSError.
    """
    with naming_space(path, lambda: len(content)), new_file(path) as (file, name):
        file.write(content)
        file.close()
        try:
            os.link(name, path)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno in FULL:
                raise
            _create_without_links(path, content)


def _create_without_links(path: str, content: bytes) -> None:
    file = open(path, "xb")  # noqa: SIM115 - some file systems report a full disk at the close
    try:
        with file:
            _fill(file, content)
    except BaseException:
        os.unlink(path)
        raise


def _fill(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()  # This makes a full disk raise here.


def walk(path: str) -> Iterator[tuple[str, int]]:
    """Yield (path relative to the folder, size in bytes) of all files below a folder.

    The order is arbitrary. Links are followed. Raises InputError for a folder that may not be
    read.
    """
    # fsspec's own listing takes twice as long and does not follow links to folders.
    for folder, _, names in os.walk(path, followlinks=True, onerror=_raise_unreadable):
        below = folder[len(path) :].lstrip("/")
        for name in names:
            size = os.stat(f"{folder}/{name}").st_size
            yield f"{below}/{name}" if below else name, size


def _raise_unreadable(error: OSError) -> None:
    if isinstance(error, FileNotFoundError | NotADirectoryError):  # There is no folder to read.
        return
    raise InputError(
        f"{error.filename}: may not be read ({error.strerror}), and its files would be left out: "
        "allow it (chmod), or take the folder away"
    ) from None


def remove(path: str) -> None:
    """Delete a file, a link, or a folder with its contents. Do nothing if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def sync(file: BinaryIO) -> None:
    """Wait until the written bytes are on the disk.

    File systems that do not support fsync are not waited for.
    """
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
