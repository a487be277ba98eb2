"""Check URLs and names that were read from a file, which a stranger may have written.

URLs that a user types are not checked here. Those from a file may not

- chain file systems (`reference::` renders templates, `simplecache::` writes to the disk),
- use a scheme that runs code or reads anything but objects,
- name a file outside the folder of the file they stand in.
"""

import os

from shards.errors import InputError
from shards.storage.redaction import redact

SCHEMES = (
    *("file", "local", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"),
    *("http", "https"),
)
"""Schemes that a URL read from a file may have. A path without a scheme is a local path."""

_LONGEST = 200  # A message shows at most this many characters of text from a file.


def check_url(url: object, field: str, file: str, mend: str = "") -> str:
    """Return `url`, which `file` gives as the value of `field`, if it may be opened.

    Args:
        mend: What the user can do about it; by default, to give the field on the command line.

    Raises InputError, naming file, field and URL, unless it is a local path or a plain URL whose
    scheme is in SCHEMES.
    """
    mend = mend or f"give it by hand: --{field} URL"
    if not isinstance(url, str):
        kind = type(url).__name__
        raise InputError(f"{file}: {field} is no URL but a {kind}, the file is damaged: {mend}")
    scheme, mark, _ = url.partition("://")
    chained = "::" in url or "\0" in url
    # fsspec also opens `data:` URLs, which have no `://`.
    known = scheme in SCHEMES if mark else not url.startswith("data:")
    if chained or not known:
        raise InputError(
            f"{file}: {field} {_shown(url)} is not opened, because a URL out of a file must be a "
            f"local path or begin with {', '.join(SCHEMES)} and hold no `::`: if you trust it, "
            f"{mend}"
        )
    return url


def check_name(name: object, file: str, mend: str) -> None:
    """Raise InputError unless `name`, which was read from `file`, names a file in its folder.

    A name that is empty, `.` or `..` does not, nor one that contains a slash, a backslash (which
    some stores treat as a slash), NUL, or an unpaired UTF-16 surrogate.

    Args:
        mend: What the user can do about a bad name. It ends the message.
    """
    if not isinstance(name, str):
        kind = type(name).__name__
        raise InputError(f"{file}: is damaged, it has a {kind} in place of a file's name; {mend}")
    if name in ("", ".", "..") or set(name) & set("/\\\0") or not can_be_encoded(name):
        raise InputError(
            f"{file}: names {_shown(name)}, which is no plain name of a file in its folder: it is "
            f"damaged or malicious; {mend}"
        )


def check_path(path: object, file: str, mend: str) -> None:
    """Raise InputError unless `path` names a file in the folder of `file` or below it.

    Each of its parts has to be a plain name; see `check_name`.
    """
    for part in path.split("/") if isinstance(path, str) else [path]:
        check_name(part, file, mend)


def can_be_encoded(name: str, local: bool = True) -> bool:
    """Return whether a name is one of a file, on a local disk or, in UTF-8, in an object store."""
    try:
        os.fsencode(name) if local else name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str) -> str:
    """Return the text as ASCII on one line, cut to _LONGEST characters, without URL secrets."""
    parts = "::".join(redact(part) for part in text.split("::"))
    return ascii(parts[:_LONGEST])
