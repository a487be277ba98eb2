"""Write, list and remove files on a local disk.

A file is either complete or absent, except where `create` says otherwise. The functions work on
file systems without hard links or fsync too. Paths are used literally, without pattern matching.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

from shards.errors import InputError
from shards.storage.failures import FULL
from shards.storage.space import naming_space

EMPTY = "empty folders"
OUTSIDE = "links to files outside of the folder"
TWICE = "links to folders inside of the folder"
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


class NotWritable(PermissionError):
    """A place on a local disk may not be written to. The text names the folder and the reason."""

    def __init__(self, text: str, path: str = "", number: int = errno.EACCES) -> None:
        """Hold the text, the path of what was to be written, and the number of the error."""
        super().__init__(text)
        self.path = path
        self.errno = number  # by which others tell a disk's errors from a store's


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def absolute(url: str) -> str:
    """Return a URL that names the same place from any folder. An empty one stays empty."""
    if not url or "://" in url:
        return url
    path = os.path.join(os.getcwd(), os.path.expanduser(url))
    # Behind a link, what `..` leads to cannot be told from the path alone.
    return path if ".." in path.split("/") else os.path.normpath(path)


def make_folder_of(path: str) -> None:
    """Make the folder that the file `path` lies in. Raises NotADirectoryError for a file there."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:  # `create` must not see the first one
        raise tell_obstacle(error) from None
    except OSError as error:  # In /proc, no folder can be made, and the error is that of none.
        raise _tell_denial(error, path, _DENIED | {errno.ENOENT}) from None


@contextlib.contextmanager
def _naming_denial(path: str) -> Iterator[None]:
    """Raise NotWritable where the block, which opens a file, may not write to its place."""
    try:
        yield
    except OSError as error:
        raise _tell_denial(error, path, _DENIED) from None


def _tell_denial(error: OSError, path: str, denied: set[int]) -> OSError:
    """Return NotWritable, which names a folder that is there, or else `error` itself."""
    if error.errno not in denied:
        return error
    place = os.path.abspath(path)
    if error.errno == errno.EROFS or not os.path.isfile(place):
        place = os.path.dirname(place)
        while not os.path.isdir(place):
            place = os.path.dirname(place)
    text = f"{place}: may not be written to ({os.strerror(error.errno)})"
    return NotWritable(text, os.path.abspath(path), error.errno)


def tell_obstacle(error: OSError) -> OSError:
    """Return the error that names the file where a folder had to be, or else `error` itself."""
    place = found = os.fsdecode(error.filename or "")
    while found and not os.path.lexists(found):
        found = os.path.dirname(found)
    if not found or os.path.isdir(found):
        return error
    use = "a folder is needed there" if found == place else f"{place} cannot lie in it"
    return NotADirectoryError(f"{found}: is no folder, and {use}: give another place, or move it")


@contextlib.contextmanager
def new_file(path: str) -> Iterator[tuple[BinaryIO, str]]:
    """Yield a new file beside `path`, and its name, which is unique to this call.

    The file is deleted when the block ends, unless it was renamed.
    """
    make_folder_of(path)
    name = f"{path}.{secrets.token_hex(6)}.partial"
    with _naming_denial(path):
        file = open(name, "xb")  # noqa: SIM115 - it is closed below, and only opening it is denied
    try:
        with file:
            yield file, name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


@contextlib.contextmanager
def proposing(remedy: str, below: str = "") -> Iterator[None]:
    """Add what mends it to a NotWritable of the block, if its path lies below the URL `below`."""
    try:
        yield
    except NotWritable as error:
        plain = below.removeprefix("file://").removeprefix("local://")
        folder = os.path.abspath(os.path.expanduser(plain)).rstrip("/")
        number = error.errno or errno.EACCES
        if not remedy or (plain and not f"{error.path}/".startswith(f"{folder}/")):
            raise
        raise NotWritable(f"{error}: {remedy}", error.path, number) from None


def write(path: str, content: bytes) -> None:
    """Write a file and rename it to `path`, replacing what was there. Raises OSError."""
    with naming_space(path, lambda: len(content)), new_file(path) as (file, name):
        file.write(content)
        file.close()
        os.replace(name, path)


def append(path: str, content: bytes) -> None:
    """Append to a file, which is created if it is missing. Raises OSError that names the file."""
    with naming_space(path, lambda: len(content), path):
        with _naming_denial(path):
            file = open(path, "ab")  # noqa: SIM115 - only an error of opening it is a denial
        with file:
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
    with _naming_denial(path):
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


def walk(
    path: str,
    *,
    follow_links: bool = True,
    leave_out: Callable[[str, str], None] = lambda _reason, _path: None,
) -> Iterator[tuple[str, int]]:
    """Yield (path relative to the folder, size in bytes) of all files below a folder.

    A link inside of the folder counts as what it leads to, so a file may come under several paths.
    The order is arbitrary. Raises InputError for a folder that may not be read.

    Args:
        follow_links: Also take files and folders outside of the folder that links in it lead to.
        leave_out: Is called with the reason and the path of what is no file to take, with EMPTY and
            the path of an empty folder, and with TWICE and the path of a link to a folder whose
            files are taken by this path too. The reason is OUTSIDE for a link that would be taken
            if links were followed.
    """
    root = os.path.realpath(path)
    # A folder to read: its path, its path relative to the root, its real path, and the real paths
    # of the folders that the links on the way to it lie in.
    folders: list[tuple[str, str, str, tuple[str, ...]]] = [(path, "", root, ())]
    while folders:
        folder, below, real, way = folders.pop()
        entries = _list(folder)
        if not entries and below:
            leave_out(EMPTY, below.rstrip("/"))
        for entry in entries:
            name, linked = below + entry.name, entry.is_symlink()
            target = os.path.realpath(entry.path) if linked else os.path.join(real, entry.name)
            if linked and any(_is_in(one, target) for one in (*way, real)):
                leave_out("links to a folder that they lie in", name)
            elif linked and (fault := _find_fault(target, root, follow_links)):
                leave_out(fault, name)
            elif entry.is_dir():
                if linked and _is_in(target, root):
                    leave_out(TWICE, name)
                folders.append((entry.path, f"{name}/", target, (*way, real) if linked else way))
            elif entry.is_file():
                yield name, entry.stat().st_size
            else:
                leave_out("pipes, sockets and devices", name)


def _list(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        _raise_unreadable(error)
        return []


def _find_fault(target: str, root: str, follow_links: bool) -> str:
    """Return why a link to `target` is not followed; "" when it is."""
    if not os.path.exists(target):
        return "links that lead nowhere"
    if not follow_links and not _is_in(target, root):
        return OUTSIDE
    return ""


def _is_in(path: str, folder: str) -> bool:
    """Return whether a real path is that of a folder, or of what lies in it."""
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


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


def check_kind(path: str) -> None:
    """Raise InputError for a pipe, a device or a socket, which may never end.

    What is not there, or may not be looked at, is left to the call that reads it.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a pipe, a device or a socket: give a file")


def lies_below(path: str, folder: str) -> bool:
    """Return whether `path` is the folder or in it, when all links on the way are followed.

    The last name of `path` may be a link, because a link is removed and not what it leads to.
    """
    parent = os.path.realpath(os.path.dirname(path.rstrip("/")))
    return path == folder or _is_in(parent, os.path.realpath(folder))


def link_out(path: str, folder: str) -> str:
    """Return where `path` leads to if it is a link out of the folder, or ""."""
    target = os.path.realpath(path)
    inside = _is_in(target, os.path.realpath(folder))
    return target if os.path.islink(path) and not inside else ""


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


def find_missing(folder: str) -> list[str]:
    """Return the folders that would have to be made so that `folder` exists, the deepest first."""
    missing = []
    folder = os.path.abspath(folder)
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def remove_empty(folders: list[str]) -> None:
    """Remove those of `folders` that exist and are empty. Give them with the deepest first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
