"""URLs and names that were read from a file, which a stranger may have written.

What a user types is the user's to choose. What stands in a file may lead only to plain places: no
chain of file systems (`reference::` renders templates, `simplecache::` writes to the disk), no
scheme that runs or reads something else than objects, and no name outside of the file's own folder.
"""

import os

from shards.errors import InputError
from shards.storage.failures import redact

SCHEMES = (
    *("file", "local", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"),
    *("http", "https"),
)
"""Those of URLs out of files; a path without a scheme is a local one."""

_LONGEST = 200  # characters of a foreign text in a message


def check_url(url: object, field: str, file: str) -> str:
    """The URL that stands in `file` as the value of `field`, if it may be opened.

    Raises InputError, naming file, field and URL, unless it is a plain URL of one of SCHEMES or a
    local path.
    """
    mend = f"give it by hand: --{field} URL"
    if not isinstance(url, str):
        kind = type(url).__name__
        raise InputError(f"{file}: {field} is no URL but a {kind}, the file is damaged: {mend}")
    scheme, mark, _ = url.partition("://")
    chained = "::" in url or "\0" in url
    known = scheme in SCHEMES if mark else not url.startswith("data:")  # fsspec knows that one too
    if chained or not known:
        raise InputError(
            f"{file}: {field} {_shown(url)} is not opened, because a URL out of a file must be a "
            f"local path or begin with {', '.join(SCHEMES)} and hold no `::`: if you trust it, "
            f"{mend}"
        )
    return url


def check_name(name: object, file: str, mend: str) -> str:
    """The name that stands in `file`, if it is the plain name of a file in the same folder.

    Raises InputError, naming `file` and `mend`, for one that leads elsewhere: empty, `.`, `..`,
    with a slash, a backslash (a slash to some stores), NUL, or half a character of UTF-16.
    """
    if not isinstance(name, str):
        kind = type(name).__name__
        raise InputError(f"{file}: is damaged, it has a {kind} in place of a file's name; {mend}")
    if name in ("", ".", "..") or set(name) & set("/\\\0") or not _can_be_encoded(name):
        raise InputError(
            f"{file}: names {_shown(name)}, which is no plain name of a file in its folder: it is "
            f"damaged or malicious; {mend}"
        )
    return name


def _can_be_encoded(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str) -> str:
    """On one line, without the secrets of any URL in it."""
    parts = "::".join(redact(part) for part in text.split("::"))
    return ascii(parts[:_LONGEST])
