"""The packages that this one needs, as pyproject.toml names them.

The entry points check them before they import the engine, whose imports would fail on a package
that is too old with a message that does not say so.
"""

import os
import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = "byol-engine"


def check_requirements() -> None:
    """End this process with one line when a package is missing or older than is needed."""
    if fault := find_fault():
        # Of the processes on a machine the first one tells what all of them find.
        sys.exit(f"error: {fault}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def find_fault() -> str:
    """What is wrong with the first package that does not do, in one line; empty when all do."""
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:  # run from a folder that was never installed
        return ""
    for line in lines:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        remedy = f"run: pip install '{needed.name}{needed.specifier}'"
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            return f"{needed.name} is not installed: {remedy}"
        # Builds of a vendor, such as 2.11.0a0+nv26.1, count as the release that they come before.
        if not needed.specifier.contains(Version(found).base_version, prereleases=True):
            return f"{needed.name} {found} does not do, {needed} is needed: {remedy}"
    return ""
