"""Find what a user may have meant who gave a URL one level too high or too low.

It is called when nothing was found at the URL, to end the message about that with a hint.
"""

import contextlib
from collections.abc import Iterator

from shards.errors import InputError
from shards.storage import files

MOST = 20  # No more folders than these are looked into.


def folder_of(url: str) -> str:
    """Return the folder that holds the object at `url`; `.` for a plain name."""
    return url.rstrip("/").rpartition("/")[0] or "."


def last_name(url: str) -> str:
    """Return the last name in a URL."""
    return url.rstrip("/").rpartition("/")[2]


def find_near(url: str, name: str) -> list[str]:
    """Find folders that hold the object `name`: those right below `url`, or the one above it.

    What cannot be read counts as not there.
    """
    below = [folder for folder in folders_below(url) if _holds(folder, name)]
    above = folder_of(url)
    whole = above.endswith((":/", ":"))  # `url` is a whole bucket or disk.
    return below or [above] * (not whole and _holds(above, name))


def folders_below(url: str) -> Iterator[str]:
    """Yield the URLs of the names right below a folder, at most MOST of them."""
    with contextlib.suppress(OSError, InputError):
        for name in files.list_names(url)[:MOST]:
            yield files.join(url, name)


def _holds(folder: str, name: str) -> bool:
    try:
        return files.exists(files.join(folder, name))
    except (OSError, InputError):
        return False
