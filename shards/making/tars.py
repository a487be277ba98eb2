"""Find the tars that a user means: in folders, by brace patterns, or one by one."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice, takewhile
from typing import NamedTuple

from braceexpand import braceexpand

from shards import index
from shards.errors import InputError
from shards.making.image_folders import SPLITS, split_name
from shards.making.left_out import Reasons, explain, leave_out, merge
from shards.making.listing import is_junk
from shards.storage import files, local_files, misplaced
from shards.tar import COMPRESSED, TarError, is_parquet, is_tar, is_zip

MOST_TARS = 1_000_000  # A pattern that names more is a slip.
OWN_FOLDERS = (".index/", ".pack/")  # Indexing and packing keep here what is unfinished.


class Tars(NamedTuple):
    """The tars of one data set."""

    folder: str  # URL of the folder that holds them all
    names: list[str]  # their paths relative to the folder
    left_out: Reasons  # the other files of the folder

    def urls(self) -> list[str]:
        return [files.join(self.folder, name) for name in self.names]


def find_tars(sources: list[str], *, compressed: bool = False) -> Tars:
    """Find the tars in folders and below them, those of brace patterns, and single ones.

    Raises InputError when a source has none, when one is named twice, and when a folder holds
    several splits, which would become one data set.

    Args:
        compressed: Also take compressed tars and parquet files.
    """
    urls: list[str] = []
    left_out: Reasons = {}
    taken: list[str] = []  # in folders or one by one, perhaps by a pattern of the shell
    for source in sources:
        _check_query(source)
        if is_one_file(source, compressed=compressed):
            expanded = _expand(source)
            taken += expanded if len(sources) > 1 else []
            urls += expanded
        else:
            check_suffix(source)
            others: Reasons = {}
            found = _walk(source, others, compressed)
            if not found:
                raise _no_tars(source, others)
            merge(left_out, others)
            taken += found
            urls += found
    _check_names(taken, sources)
    places = Counter(_place(url) for url in urls)
    for url in urls:
        if places[_place(url)] > 1:
            raise InputError(f"SOURCE {files.redact(url)}: is named twice")
    # What lies below one folder is named from there on, whatever its own spelling is.
    if not _is_one_folder(sources) and any(".." in url.split("/") for url in urls):
        urls = [_place(url) for url in urls]
    prefix = _common_folder(urls, sources)
    names = [url[len(prefix) :].lstrip("/") for url in urls]
    return Tars(prefix or ("/" if urls[0].startswith("/") else "."), names, left_out)


def check_is_file(url: str) -> None:
    """Raise TarError for a local folder or pipe, which can't be read as a tar."""
    path = files.local_path(url)
    if files.is_local(url) and os.path.exists(path) and not os.path.isfile(path):
        raise TarError("it is no file")


def same_place(folder: str, other: str) -> bool:
    """Return whether two URLs, in whatever spelling, name the same folder."""
    if files.is_local(folder) and files.is_local(other):
        one, two = (files.local_path(url) for url in (folder, other))
        return os.path.realpath(one) == os.path.realpath(two)
    return folder.rstrip("/") == other.rstrip("/")


def check_apart(tars: Tars, sources: list[str], out: str) -> None:
    """Raise InputError if packing to `out` could replace the tars that it reads, or read its own.

    Args:
        sources: The folders and files that gave the tars.
    """
    places = [out, *(files.join(out, name) for name in SPLITS)]
    for folder in {url.rpartition("/")[0] or "." for url in tars.urls() if not is_zip(url)}:
        if any(same_place(folder, place) for place in places):
            raise InputError(
                f"OUT {files.redact(out)}: the tars of SOURCE lie there, and shards would take "
                "their places: choose another OUT"
            )
    for source in sources:
        if not is_one_file(source, compressed=True) and _lies_in(out, source):
            raise InputError(
                f"OUT {files.redact(out)}: lies in SOURCE {files.redact(source)}, and the next "
                "call would take the shards for tars to pack: choose another OUT"
            )


def _lies_in(place: str, folder: str) -> bool:
    """Return whether a URL names a folder or what lies in it."""
    if files.is_local(place) and files.is_local(folder):
        place, folder = (os.path.realpath(files.local_path(url)) for url in (place, folder))
    return f"{place.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def is_one_file(source: str, *, compressed: bool) -> bool:
    """Return whether a source is called like a tar, and is no local folder of such a name.

    Args:
        compressed: Also take the names of compressed tars, of parquet files and of zip files.
    """
    return is_tar(source, compressed=compressed) and not _is_folder(source)


def _is_folder(source: str) -> bool:
    return files.is_local(source) and os.path.isdir(files.local_path(source))


def _is_one_folder(sources: list[str]) -> bool:
    return len(sources) == 1 and not is_tar(sources[0], compressed=True)


def _no_tars(source: str, left_out: Reasons) -> InputError:
    """Return the error for a folder without tars, which says what lies there instead."""
    place = f"SOURCE {files.redact(source)}"
    if misplaced.last_name(source).endswith(".json"):
        folder = files.redact(misplaced.folder_of(source))
        return InputError(f"{place}: no .tar files there; give the folder {folder}")
    if not left_out and not files.exists(source):
        return InputError(f"{place}: no such folder")
    return InputError(f"{place}: no .tar files there{explain(left_out)}")


def _place(url: str) -> str:
    """Return one spelling for all that name the same local file. A link is a file of its own."""
    if not files.is_local(url):
        return url
    folder, name = os.path.split(files.local_path(url))
    return os.path.join(os.path.realpath(folder), name)


def _check_query(source: str) -> None:
    """Raise InputError for a signed URL, because index.json would hold its signature."""
    address = source.partition("?")[0]
    if source.startswith(("http://", "https://")) and address != source:
        raise InputError(
            f"SOURCE {files.redact(source)}: a URL with a query (?) is not read, because "
            f"{index.NAME} would tell what it holds: download the tar"
        )


def _expand(source: str) -> list[str]:
    """Return the names that a brace pattern stands for, or the one of a file of just this name."""
    http = source.startswith(("http://", "https://"))  # Some servers answer to any name.
    if "{" in source and not http and files.exists(source):
        return [source]
    # braceexpand takes the numbers of a range all at once.
    ranges = re.findall(r"\{(-?\d{1,30})\.\.(-?\d{1,30})", source)
    try:
        # Backslashes stand for themselves.
        names = (
            []
            if any(abs(int(a) - int(b)) > MOST_TARS for a, b in ranges)
            else list(islice(braceexpand(source, escape=False), MOST_TARS + 1))
        )
        if not 0 < len(names) <= MOST_TARS:
            raise InputError(
                f"SOURCE {files.redact(source)}: stands for more than {MOST_TARS:,} tars"
            )
        return names
    except ValueError as error:
        raise InputError(f"SOURCE {files.redact(source)}: not a brace pattern: {error}") from None


def check_suffix(source: str) -> None:
    """Raise InputError for a file that is no tar."""
    name = "" if _is_folder(source) else source.lower()
    if name.endswith(COMPRESSED):
        raise InputError(
            f"SOURCE {files.redact(source)}: is compressed, so no parts of it can be read: repack "
            "it with `python launch/pack.py SOURCE OUT`"
        )
    if name.endswith((".7z", ".rar")):
        kind = name.rpartition(".")[2]
        raise InputError(
            f"SOURCE {files.redact(source)}: a {kind} file is not read: extract its images to a "
            "folder, and pack that with `python launch/pack.py FOLDER OUT`"
        )


def _walk(source: str, left_out: Reasons, compressed: bool) -> list[str]:
    if source.startswith(("http://", "https://")):
        raise InputError(
            f"SOURCE {files.redact(source)}: a folder can't be listed over http: name the tars, "
            'such as "https://host/tars/part-{0000..0146}.tar"'
        )
    found = []

    def note(reason: str, path: str) -> None:
        if reason not in (local_files.EMPTY, local_files.TWICE):
            leave_out(left_out, reason, path)

    for path, _ in files.walk(source, leave_out=note):
        name = path.rpartition("/")[2]
        if path.startswith(OWN_FOLDERS):
            continue
        if is_junk(path):
            leave_out(left_out, "hidden files and files of file managers", path)
        elif is_tar(name, compressed=compressed):
            found.append(path)
        elif is_tar(name, compressed=True):
            kinds = "parquet files" if is_parquet(name) else "compressed tars"
            kinds = "zip files" if is_zip(name) else kinds
            reason = f"{kinds}, which `python launch/pack.py SOURCE OUT` repacks"
            leave_out(left_out, reason, path)
        elif name != index.NAME and not name.endswith(".blocks.json"):
            _, dot, extension = name.rpartition(".")
            kind = f".{extension.lower()} files" if dot else "files without an extension"
            leave_out(left_out, kind, path)
    _check_splits(source, found)
    return [files.join(source, path) for path in sorted(found)]


def _check_splits(source: str, found: list[str]) -> None:
    """Raise InputError when the folders of tars are those of several splits."""
    place = f"SOURCE {files.redact(source)}"
    folders = {path.partition("/")[0] for path in found if "/" in path and not is_parquet(path)}
    if len(splits := sorted(name for name in folders if split_name(name))) > 1:
        raise InputError(f"{place}: holds {' and '.join(splits)}: index each alone")


def _check_names(urls: list[str], sources: list[str]) -> None:
    """Raise InputError when the tars are called like several splits."""
    kinds: dict[str, str] = {}
    packed = (url for url in urls if not is_parquet(url) and not is_zip(url))
    for name in sorted(url.rpartition("/")[2] for url in packed):
        words = re.split("[^A-Za-z]+", name.partition(".")[0])
        if len(splits := {split for word in words if (split := split_name(word))}) == 1:
            kinds.setdefault(splits.pop(), name)
    if len(kinds) > 1:
        raise InputError(
            f"SOURCE {_names(sources)}: holds tars of several splits, such as "
            f"{' and '.join(kinds.values())}: name those of one by a pattern in quotes, such as "
            '"FOLDER/train-{000..146}.tar"; one such as "FOLDER/{train,val}-{000..146}.tar" takes '
            "both"
        )


def _common_folder(urls: list[str], sources: list[str]) -> str:
    """Return the URL of the deepest folder that holds all tars, without a slash at its end."""
    if _is_one_folder(sources):
        return sources[0].rstrip("/")
    parts = [url.rpartition("/")[0].split("/") for url in urls]
    first, last = min(parts), max(parts)  # What these two share, all share.
    pairs = zip(first, last, strict=False)
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    if "://" in urls[0] and len(shared) < 3:
        raise InputError(
            f"SOURCE {_names(sources)}: the tars must lie in one bucket, for one {index.NAME}"
        )
    return "/".join(shared)


def _names(sources: Iterable[str]) -> str:
    first = [files.redact(source) for source in islice(sources, 4)]
    return " ".join(first[:3]) + " ..." * (len(first) > 3)
