"""Read and write bytes at any fsspec URL: local paths, s3://, gs://, memory:// and others.

A URL is a name, never a pattern or a chain: `[ ] * ? # % ::` and spaces stand for themselves. Only
the named object, or what lies below it, is read, replaced or removed.
"""

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, cast

import fsspec

from shards.documents import parse_json
from shards.errors import InputError
from shards.storage import local_files, names
from shards.storage.failures import is_beyond_end, is_refused_listing
from shards.storage.local_files import is_local as is_local
from shards.storage.range_file import RangeFile
from shards.storage.redaction import SLIP, has_query
from shards.storage.redaction import redact as redact
from shards.storage.retries import WrongLength, retry
from shards.storage.s3 import is_s3 as is_s3
from shards.storage.s3 import open_s3
from shards.storage.space import naming_space
from shards.threads import run_in_threads

READ_BLOCK = 4 << 20  # `open_reader` asks an object store for this many bytes at a time.
PART = 16 << 20  # Large objects are sent and copied in parts of this many bytes.
ONE_PUT = 5 << 30  # S3 takes no more bytes than these in one request.
SECONDS = 60.0  # One try of a read may take this long, and one second more for each MB.
DELETIONS = 32  # This many objects are deleted at once.


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of `url` and the path inside it.

    Raises InputError when no filesystem is known for the URL.
    """
    # fsspec's own url_to_fs is not used, because it reads `::` as a chain of file systems.
    protocol = "file" if is_local(url) else url.partition("://")[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
        # s3fs would read parts of some names as queries.
        options = {} if is_s3(url) else kind._get_kwargs_from_urls(url)
        filesystem, path = fsspec.filesystem(protocol, **options), kind._strip_protocol(url)
    except (ImportError, ValueError, TypeError, OSError) as error:
        known = re.fullmatch(r"[\w+.-]+", protocol)  # What is no word may hold a secret.
        reason = error if known else "its scheme is not known"
        raise InputError(f"{redact(url)}: no storage for this URL: {reason}") from None
    # fsspec's memory filesystem strips the leading slash, but only from names that contain `::`.
    return filesystem, f"/{path.lstrip('/')}" if protocol == "memory" and path else path


def local_path(url: str) -> str:
    """Return the path of a URL that names a place on a local disk."""
    return open_filesystem(url)[1]


def client(url: str) -> tuple[Any, str]:
    """Return what `open_filesystem` returns, but for S3 what `open_s3` does."""
    return open_s3(url) if is_s3(url) else open_filesystem(url)


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])


def read(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Read the bytes [start, stop) of an object; by default, read all of it.

    Raises FileNotFoundError at once, WrongLength when the object ends before `stop`, InputError
    for a pipe or a device, and OSError naming the URL after a bounded number of retries.
    """
    filesystem, path = client(url)
    if is_local(url):
        local_files.check_kind(path)
    asked = None if start is None or stop is None else stop - start
    # A server that sends a few bytes now and then would keep a read without a timeout alive.
    seconds = 10 * SECONDS if asked is None else SECONDS + asked / 1e6
    options = {"timeout": seconds} if filesystem.async_impl else {}

    def get() -> bytes:
        try:
            content: bytes = filesystem.cat_file(path, start=start, end=stop, **options)
        except OSError as error:
            if asked is None or not is_beyond_end(error):
                raise
            content = b""
        if asked is not None and len(content) > asked and not is_local(url):
            raise WrongLength("the server sends all of a file instead of a part: download it")
        if asked is not None and len(content) != asked:
            raise WrongLength(f"bytes {start} to {stop}: {len(content)} of {asked} bytes came")
        return content

    return retry(url, get)


def read_json(url: str) -> Any:
    """Read the JSON document in an object.

    Raises ValueError when the content is not JSON that this project writes, as `parse_json` does,
    and what `read` raises.
    """
    return parse_json(read(url))


def check(url: str, name: str) -> None:
    """Raise InputError for a URL that looks mistyped.

    Args:
        name: Name of the field or argument that gave the URL, for the message.
    """
    scheme, mark, place = url.partition("://")
    if not re.fullmatch(r"\s*[\w+.-]*\s*", scheme):
        mark = ""  # It stands somewhere inside of a path, or of a password.
    if mark and not place.strip("/"):
        raise InputError(f"{name} {redact(url)}: names no bucket or folder")
    if mark and scheme != scheme.strip().lower():
        meant = scheme.strip().lower()
        raise InputError(f"{name} {redact(url)}: a URL begins with small letters: {meant}://...")
    if not mark and (slip := SLIP.match(url)):
        meant = (slip[1] or slip[2]).lower()
        raise InputError(f"{name} {redact(url)}: a URL has two slashes: {meant}://...")
    if is_s3(url) and has_query(place):
        raise InputError(f"{name} {redact(url)}: an s3 URL has no query: leave out what follows ?")
    if "\0" in url or not names.can_be_encoded(url, is_local(url)):
        text = "holds NUL or half a character, which no name has: correct it"
        raise InputError(f"{name} {redact(url)}: {text}")


def is_root(url: str) -> bool:
    """Return whether a URL names a whole disk, bucket or server, and no folder there."""
    if is_local(url):
        return os.path.realpath(local_path(url)) == os.path.sep
    scheme, _, place = url.partition("://")
    # The name of an access point has a slash of its own, and memory has no buckets.
    root = re.fullmatch(r"(arn:[^/]*:accesspoint/[^/]+|[^/]*)/*", place)
    return scheme != "memory" and root is not None


def check_no_root(url: str, name: str, what: str, example: str) -> None:
    """Raise InputError when a folder to write is a whole disk, bucket or server.

    Args:
        name: Name of the field or argument that gave the URL, for the message.
        what: What is written there.
        example: A folder to write to instead, from there on.
    """
    if is_root(url):
        kind = "disk" if is_local(url) else "bucket"
        place = redact(url).rstrip("/") if kind == "bucket" else ""
        raise InputError(
            f"{name} {redact(url)}: is a whole {kind}, where {what} would lie among other files: "
            f"give a folder there, such as {place}/{example}"
        )


def check_folder(url: str, name: str) -> None:
    """Raise InputError when a local folder to write cannot be one, because a file is in its place.

    Args:
        name: Name of the field or argument that gave the URL, for the message.
    """
    if not is_local(url):
        return
    place = open_filesystem(url)[1].rstrip("/")
    while place and not os.path.lexists(place):
        place = os.path.dirname(place)
    if place and not os.path.isdir(place):
        raise InputError(f"{name} {redact(url)}: {redact(place)} is no folder: choose another")


def download(url: str, size: int, path: str) -> None:
    """Copy an object of `size` bytes to a local file, completely or not at all.

    Raises what `read` raises.
    """
    with naming_space(path, lambda: size), local_files.new_file(path) as (file, name):
        for start in range(0, size, PART):
            file.write(read(url, start, min(start + PART, size)))
        file.close()
        os.replace(name, path)


def open_reader(url: str) -> BinaryIO:
    """Open a seekable file. Remote files are read in large blocks. Raises FileNotFoundError."""
    if is_local(url):
        filesystem, path = open_filesystem(url)
        local_files.check_kind(path)
        return cast(BinaryIO, filesystem.open(path, "rb"))
    return cast(BinaryIO, io.BufferedReader(RangeFile(size(url), partial(read, url)), READ_BLOCK))


def write(url: str, content: bytes) -> None:
    """Write an object completely or not at all, by one request or by a rename on a local disk.

    Missing local folders are created. For large objects, see upload.py.
    """
    if is_local(url):
        retry(url, lambda: local_files.write(local_path(url), content))
        return
    filesystem, path = client(url)
    options = {"chunksize": ONE_PUT} if is_s3(url) else {}
    retry(url, lambda: filesystem.pipe_file(path, content, **options))


def exists(url: str) -> bool:
    """Return whether there is such an object, or such a folder as far as folders may be listed."""
    filesystem, path = client(url)

    def look() -> bool:
        try:
            return bool(filesystem.exists(path))
        except PermissionError as error:
            if is_refused_listing(error):
                return False  # Before it asked for a list, the store said that no object is there.
            raise

    return retry(url, look)


def size(url: str) -> int:
    """Return the length of an object in bytes. Raises FileNotFoundError."""
    filesystem, path = client(url)
    return int(retry(url, lambda: filesystem.size(path)))


def list_names(url: str) -> list[str]:
    """List the names directly under a folder, sorted. The list is empty if there is no folder."""
    filesystem, path = client(url)
    filesystem.invalidate_cache()
    try:
        found = retry(url, lambda: filesystem.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    # A file is listed as if it lay in itself, and so is a folder's own marker on some servers.
    below = (entry.rstrip("/") for entry in found)
    return sorted(entry.rpartition("/")[2] for entry in below if entry != path.rstrip("/"))


def walk(
    url: str,
    *,
    follow_links: bool = True,
    leave_out: Callable[[str, str], None] = lambda _reason, _path: None,
) -> Iterator[tuple[str, int]]:
    """Yield (path relative to the folder, size in bytes) of all files below a folder.

    The order is arbitrary. Raises InputError for a local folder that may not be read. For the
    arguments, see `local_files.walk`.
    """
    filesystem, path = client(url)
    if is_local(url):
        yield from local_files.walk(path, follow_links=follow_links, leave_out=leave_out)
        return
    filesystem.invalidate_cache()
    for file, info in retry(url, lambda: filesystem.find(path, detail=True)).items():
        yield file.removeprefix(path).lstrip("/"), info["size"]


def remove(url: str) -> None:
    """Delete the object with exactly this name, and everything below it if it is a folder.

    Do nothing if nothing is there. Each object is deleted by its own request, many in parallel:
    some stores refuse requests that delete several objects, and fsspec's own `rm` reads names as
    patterns. Raises InputError for a whole disk or bucket.
    """
    filesystem, path = client(url)
    if not path.strip("/") or (is_s3(url) and not filesystem.split_path(path)[1]):
        raise InputError(f"{redact(url)}: a whole disk or bucket is never removed")
    if is_local(url):
        retry(url, lambda: local_files.remove(path))
        return
    filesystem.invalidate_cache()
    found = set(retry(url, lambda: filesystem.find(path)))  # Markers of folders end in a slash.
    found = {name for name in found if name == path or name.startswith(f"{path}/")}
    if path not in found and retry(url, lambda: filesystem.isfile(path)):
        found.add(path)

    def delete(name: str) -> None:
        if is_s3(url):  # s3fs's own methods drop the slash at the end of a name.
            bucket, _, _ = filesystem.split_path(path)
            key = name[len(bucket) + 1 :]
            retry(url, lambda: filesystem.call_s3("delete_object", Bucket=bucket, Key=key))
            return
        with contextlib.suppress(FileNotFoundError):
            retry(url, lambda: filesystem.rm_file(name))

    run_in_threads(delete, found, DELETIONS)
    if is_s3(url):  # Some servers keep empty folders. On other servers this does nothing.
        slashes = ((name, i) for name in found for i in range(len(path), len(name)))
        folders = {name[: i + 1] for name, i in slashes if name[i] == "/"}
        for folder in sorted(folders, reverse=True):
            delete(folder)
    filesystem.invalidate_cache()


def discard(url: str, place: str, report: Callable[[str], None]) -> bool:
    """Remove what is no longer needed. If the store refuses, report it and return False.

    The report names `place`, which is the run or folder, instead of the object. So a `report` that
    drops repeated messages says only once per run that old objects stay.

    What a link leads to, outside of `place`, is somebody else's and stays.
    """
    if is_local(url):
        path, folder = (local_path(one) for one in (url, place))
        if not local_files.lies_below(path, folder):
            report(f"{redact(url)}: is not removed, because a link leads out of {redact(place)}")
            return False
    try:
        remove(url)
    except OSError as error:
        reason = str(error).removeprefix(f"{redact(url)}: ")
        cause = re.sub(r"^gave up after \d+ tries in \d+ s: ", "", reason).partition(": ")[0]
        report(f"{redact(place)}: old objects stay there, because they can't be removed ({cause})")
        return False
    return True


def discard_or_empty(url: str, place: str, report: Callable[[str], None]) -> None:
    """Remove an object that would mislead its next reader, or empty it if it can't be removed.

    Raises OSError when it can't be emptied either.
    """
    if not discard(url, place, report):
        write(url, b"")
