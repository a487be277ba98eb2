"""Find the tars that a user means: in folders, by brace patterns, or one by one."""

from collections import Counter
from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

from braceexpand import braceexpand

from shards import index
from shards.errors import InputError
from shards.making.image_folders import is_junk, split_name
from shards.making.left_out import Reasons, explain, leave_out
from shards.storage import files, misplaced

COMPRESSED = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz"),
    *(".tar.zst", ".tzst", ".tar.zstd"),
)
OWN_FOLDERS = (".index/", ".pack/")  # Indexing and packing keep here what is unfinished.


class Tars(NamedTuple):
    """The tars of one data set."""

    folder: str  # URL of the folder that holds them all
    names: list[str]  # their paths relative to the folder
    left_out: Reasons  # the other files of the folder

    def urls(self) -> list[str]:
        return [files.join(self.folder, name) for name in self.names]


def is_tar(name: str, *, compressed: bool = False) -> bool:
    """Return whether a file's name is that of a tar; a compressed one counts if `compressed`."""
    return name.lower().endswith((".tar", *COMPRESSED) if compressed else ".tar")


def find_tars(sources: list[str], *, compressed: bool = False) -> Tars:
    """Find the tars in folders and below them, those of brace patterns, and single ones.

    Raises InputError when there are none, when one is named twice, and when a folder holds several
    splits, which would become one data set.

    Args:
        compressed: Also take compressed tars.
    """
    urls: list[str] = []
    left_out: Reasons = {}
    for source in sources:
        if is_tar(source, compressed=compressed):
            urls += _expand(source)
        else:
            _check_suffix(source)
            urls += _walk(source, left_out, compressed)
    for url, number in Counter(urls).items():
        if number > 1:
            raise InputError(f"SOURCE {files.redact(url)}: is named twice")
    if not urls:
        for source in sources:
            if misplaced.last_name(source).endswith(".json"):
                folder = files.redact(misplaced.folder_of(source))
                raise InputError(
                    f"SOURCE {files.redact(source)}: no .tar files there; give the folder {folder}"
                )
        missing = [source for source in sources if not left_out and not files.exists(source)]
        if missing:
            raise InputError(f"SOURCE {files.redact(missing[0])}: no such folder")
        raise InputError(f"SOURCE {_names(sources)}: no .tar files there{explain(left_out)}")
    prefix = _common_folder(urls, sources)
    names = [url[len(prefix) :].lstrip("/") for url in urls]
    return Tars(prefix or ("/" if urls[0].startswith("/") else "."), names, left_out)


def _expand(source: str) -> list[str]:
    try:
        return list(braceexpand(source, escape=False))  # Backslashes stand for themselves.
    except ValueError as error:
        raise InputError(f"SOURCE {files.redact(source)}: not a brace pattern: {error}") from None


def _check_suffix(source: str) -> None:
    """Raise InputError for a file that is no tar."""
    name = source.lower()
    if name.endswith(COMPRESSED):
        raise InputError(
            f"SOURCE {files.redact(source)}: is compressed, so no parts of it can be read: repack "
            "it with `python launch/pack.py SOURCE OUT`"
        )
    if name.endswith((".zip", ".parquet", ".7z", ".rar")):
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
    for path, _ in files.walk(source):
        name = path.rpartition("/")[2]
        if path.startswith(OWN_FOLDERS):
            continue
        if is_junk(path):
            leave_out(left_out, "hidden files and files of file managers", path)
        elif is_tar(name, compressed=compressed):
            found.append(path)
        elif is_tar(name, compressed=True):
            reason = "compressed tars, which `python launch/pack.py SOURCE OUT` repacks"
            leave_out(left_out, reason, path)
        elif name != index.NAME and not name.endswith(".blocks.json"):
            _, dot, extension = name.rpartition(".")
            kind = f".{extension.lower()} files" if dot else "files without an extension"
            leave_out(left_out, kind, path)
    folders = {path.partition("/")[0] for path in found if "/" in path}
    if len(splits := sorted(name for name in folders if split_name(name))) > 1:
        raise InputError(
            f"SOURCE {files.redact(source)}: holds {' and '.join(splits)}: index each alone"
        )
    return [files.join(source, path) for path in sorted(found)]


def _common_folder(urls: list[str], sources: list[str]) -> str:
    """Return the URL of the deepest folder that holds all tars, without a slash at its end."""
    if len(sources) == 1 and not is_tar(sources[0], compressed=True):
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
    return " ".join(files.redact(source) for source in sources)
