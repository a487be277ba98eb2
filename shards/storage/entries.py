"""List what lies in a folder with kinds, sizes and times, by one listing and no more."""

import os
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shards.storage import files
from shards.storage.retries import retry

_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")  # of several stores


@dataclass(frozen=True)
class Entry:
    """Something that lies directly in a folder."""

    name: str
    is_folder: bool
    size: int  # in bytes; 0 for a folder
    modified: float | None  # seconds since 1970 by the store's clock; None when it tells no time


def list_entries(url: str) -> list[Entry]:
    """List what lies directly in a folder, sorted by name. The list is empty if there is no folder.

    A local link counts as what it leads to. Raises OSError when the folder may not be listed.
    """
    filesystem, path = files.client(url)
    filesystem.invalidate_cache()
    try:
        found = retry(url, lambda: filesystem.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return []
    home = path.rstrip("/")
    below = [info for info in found if info["name"].rstrip("/") != home]
    return sorted((_entry(info) for info in below), key=lambda entry: entry.name)


def _entry(info: dict[str, Any]) -> Entry:
    path = info["name"].rstrip("/")
    linked = bool(info.get("islink"))
    is_folder = os.path.isdir(path) if linked else info["type"] == "directory"
    size = 0 if is_folder else int(info.get("size") or 0)
    times = (_seconds(info.get(name)) for name in _TIMES)
    modified = next((one for one in times if one is not None), None)
    return Entry(path.rpartition("/")[2], is_folder, size, modified)


def _seconds(value: object) -> float | None:
    if isinstance(value, datetime):
        return value.timestamp()
    return float(value) if isinstance(value, (int, float)) else None
