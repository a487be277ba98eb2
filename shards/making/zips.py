"""List and read the images in zip files, which are packed as if they were folders.

Nothing is unpacked to a disk. Every entry of a zip file is compressed alone, so an image is read by
one range of bytes, whether the zip file lies on a disk or in an object store.
"""

import contextlib
import io
import re
import stat
import struct
import zipfile
import zlib
from typing import NamedTuple

from shards.errors import InputError
from shards.making.image_folders import split_name
from shards.making.left_out import Reasons, explain, leave_out
from shards.making.listing import Listing, is_junk
from shards.making.pack import Image
from shards.making.survey import ReadImage
from shards.making.tars import Tars
from shards.storage import files
from shards.tar import is_zip
from shards.threads import run_in_threads

MOST_BYTES = 1 << 30  # of an image: none needs more, and a few bytes may claim any size

# The methods whose output zipfile bounds. Hardly any zip file of images has another one.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_HEADER = 30  # bytes of an entry's own header, before its name and some extra fields
_LONGEST = 2 * 0xFFFF  # bytes of these two
_ENCRYPTED, _UTF_8 = 0x1, 0x800  # flags of an entry
_REPLACED = "entries that a later one of the same name replaces"
_DRIVE = re.compile("[A-Za-z]:")


class _Entry(NamedTuple):
    """An image in a zip file, and the range of bytes that holds it."""

    url: str
    start: int
    stop: int
    info: zipfile.ZipInfo


class _Tree(NamedTuple):
    """What lies in a zip file, by path."""

    images: dict[str, _Entry]
    empty: set[str]  # folders

    def move(self, folder: str, place: str) -> "_Tree":
        """Return what lies in a folder of the tree, at another place.

        Both end in a slash, or are "" for the top.
        """

        def rename(path: str) -> str:
            return place + path.removeprefix(folder)

        images = {rename(path): entry for path, entry in self.images.items()}
        return _Tree(images, {rename(path) for path in self.empty if path.startswith(folder)})


def are_zips(tars: Tars) -> bool:
    """Return whether these files are zip files. Raises InputError when only some of them are."""
    kinds = [is_zip(name) for name in tars.names]
    if any(kinds) and not all(kinds):
        one, other = (tars.names[kinds.index(kind)] for kind in (True, False))
        raise InputError(
            f"SOURCE {files.redact(tars.folder)}: holds zip files and tars or parquet files, such "
            f"as {one} and {other}: pack each kind alone"
        )
    return all(kinds)


def list_zips(
    zips: Tars, *, by_zip: bool, skip_damaged: bool, threads: int
) -> tuple[Listing, ReadImage]:
    """List the images in zip files as if they were those of one folder, and return what reads them.

    Folders that hold all images are skipped, because most zip files hold one folder with all else
    in it. When zip files are called like several splits, such as train.zip and val.zip, each is a
    folder of its name.

    Args:
        by_zip: Whether each zip file is a folder of its name, which names a class.
        skip_damaged: Leave out what is damaged or missing. This reads all images once.

    Raises InputError when there are no images, when zip files hold images of the same path, and
    when zip files are damaged or missing.
    """
    listing = Listing(left_out=dict(zips.left_out))
    trees = {}
    for name, url in zip(zips.names, zips.urls(), strict=True):
        try:
            trees[name] = _list_zip(url, name, listing)
        except InputError as error:
            if not skip_damaged:
                raise
            leave_out(listing.left_out, "damaged or missing zip files", str(error))
    entries: dict[str, _Entry] = {}
    for name, tree in _place(trees, by_zip).items():
        if twice := min(entries.keys() & tree.images.keys(), default=""):
            raise InputError(
                f"SOURCE {files.redact(entries[twice].url)}: holds {twice}, and so does {name}: "
                "pack each alone, or, if each is a class, use --classes-from tars"
            )
        entries |= tree.images
        listing.empty += sorted(tree.empty)
    if skip_damaged:
        _leave_out_damaged(entries, listing.left_out, threads)
    if not entries:
        place = f"SOURCE {files.redact(zips.folder)}"
        inner = f"; extract {min(listing.tars)}, and pack that" if listing.tars else ""
        raise InputError(
            f"{place}: no images in the zip files there{explain(listing.left_out)}{inner}"
        )
    listing.images += sorted((path, entry.info.file_size) for path, entry in entries.items())

    def read(image: Image, start: int | None = None, stop: int | None = None) -> bytes:
        return _read_entry(entries[image.path], stop)[start:]

    return listing, read


def _place(trees: dict[str, _Tree], by_zip: bool) -> dict[str, _Tree]:
    """Move the trees of zip files to where they lie in the one folder that all are."""
    stems = {name: name.rpartition("/")[2][: -len(".zip")] for name in trees}
    if by_zip or (len(trees) > 1 and all(map(split_name, stems.values()))):
        return {
            name: tree.move(_find_common([tree], through_splits=True), f"{stems[name]}/")
            for name, tree in trees.items()
        }
    common = _find_common(list(trees.values()))
    return {name: tree.move(common, "") for name, tree in trees.items()}


def _find_common(trees: list[_Tree], through_splits: bool = False) -> str:
    """Return the deepest folder that holds all images, with a slash at its end, or "".

    Args:
        through_splits: It may be called like a split, or lie in such a folder.
    """
    folders = [path.split("/")[:-1] for tree in trees for path in tree.images]
    common = ""
    for one, other in zip(min(folders, default=[]), max(folders, default=[]), strict=False):
        if one != other or (split_name(one) and not through_splits):
            break
        common += f"{one}/"
    return common


def _list_zip(url: str, name: str, listing: Listing) -> _Tree:
    """List a zip file. Raises InputError when it is damaged or missing."""
    place = f"SOURCE {files.redact(url)}"
    try:
        with files.open_reader(url) as file, zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except FileNotFoundError:
        raise InputError(f"{place}: no such file") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise InputError(
            f"{place}: damaged: {error}: get it again, or use --skip-damaged"
        ) from None
    return _sort(infos, end, url, name, listing)


def _sort(infos: list[zipfile.ZipInfo], end: int, url: str, name: str, listing: Listing) -> _Tree:
    """Find the images and the empty folders among the entries of a zip file.

    Args:
        end: The offset in bytes at which the last entry ends.
    """
    starts = sorted({info.header_offset for info in infos})
    stops = {start: min(stop, end) for start, stop in zip(starts, [*starts[1:], end], strict=True)}
    images: dict[str, _Entry] = {}
    folders: set[str] = set()
    filled: set[str] = set()  # folders with something in them
    for info in infos:
        path = _find_path(info)
        above = path.rpartition("/")[0]
        while above and above not in filled:
            filled.add(above)
            above = above.rpartition("/")[0]
        if info.filename.endswith(("/", "\\")):
            folders.add(path)
        elif path and listing.refuse(f"{name}/{path}"):
            continue
        else:
            start = info.header_offset
            # Of entries with the same bytes, one is taken.
            entry = _Entry(url, start, stops.pop(start, start), info)
            if reason := _find_fault(path, entry):
                leave_out(listing.left_out, reason, f"{name}/{path or info.filename}")
                continue
            if path in images:
                leave_out(listing.left_out, _REPLACED, f"{name}/{path}")
            images[path] = entry
    empty = {path for path in folders - filled - {""} if not is_junk(path)}
    return _Tree(images, empty)


def _find_path(info: zipfile.ZipInfo) -> str:
    """Return the path of an entry in its zip file, "" when it leads out of it.

    Nothing is written to such a path, but it says nothing about a class or a split.
    """
    path = info.filename
    if not (path.isascii() or info.flag_bits & _UTF_8):  # zipfile took it for the code page of DOS.
        with contextlib.suppress(UnicodeError):
            path = path.encode("cp437").decode()
    if "/" not in path:  # Some programs on Windows write backslashes.
        path = path.replace("\\", "/")
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or _DRIVE.match(path):
        return ""
    return "/".join(part for part in parts if part not in ("", "."))


def _find_fault(path: str, entry: _Entry) -> str:
    """Return why an image is left out, "" when it can be read."""
    info = entry.info
    if not path:
        return "entries whose name leads out of the zip file"
    if info.flag_bits & _ENCRYPTED:
        return "encrypted entries (extract them with the password, and pack the folder)"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "links in a zip file"
    if info.compress_type not in _METHODS:
        return "entries that are not compressed by deflate (extract them, and pack the folder)"
    if max(info.file_size, info.compress_size) > MOST_BYTES:
        return f"entries of more than {MOST_BYTES >> 30} GiB"
    if entry.start < 0 or info.compress_size > entry.stop - entry.start - _HEADER:
        return "entries that overlap other ones, so that they can't all be sound"
    return ""


def _leave_out_damaged(entries: dict[str, _Entry], left_out: Reasons, threads: int) -> None:
    """Read all images, and leave out those that are damaged."""

    def is_damaged(path: str) -> bool:
        try:
            _read_entry(entries[path], None)
        except InputError:
            return True
        return False

    paths = list(entries)
    for path, damaged in zip(paths, run_in_threads(is_damaged, paths, threads), strict=True):
        if damaged:
            leave_out(left_out, "damaged entries", path)
            del entries[path]


def _read_entry(entry: _Entry, stop: int | None) -> bytes:
    """Read an image, or its first `stop` bytes. Raises InputError when it is damaged."""
    url, start, end, info = entry
    # Nothing follows but the next entry, or bytes that no entry has.
    end = min(end, start + _HEADER + _LONGEST + info.compress_size)
    content = files.read(url, start, end)
    try:
        skip = _HEADER + sum(struct.unpack("<HH", content[26:_HEADER]))
        with zipfile.ZipExtFile(io.BytesIO(content[skip:]), "r", info) as file:
            found = file.read(info.file_size if stop is None else stop)
        if stop is None and len(found) != info.file_size:
            raise zipfile.BadZipFile(f"{len(found)} of {info.file_size} bytes are there")
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
        raise InputError(
            f"SOURCE {files.redact(url)}: its entry {info.filename} is damaged ({error}): get the "
            "zip file again, or use --skip-damaged"
        ) from None
    return found
