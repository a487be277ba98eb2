"""Check that the packages named in pyproject.toml are installed and new enough.

The entry points do this before they import the engine. With a package that is too old, the engine's
imports would fail with a message that does not name the cause.
"""

import os
import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = "byol-engine"


def check_requirements() -> None:
    """End this process with one line of error when a package is missing or too old."""
    if fault := find_fault():
        # All processes on a machine find the same fault, so only the first one prints it.
        sys.exit(f"error: {fault}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def find_fault() -> str:
    """Describe the first unsuitable package in one line. Return "" when all are suitable."""
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:  # this project was never installed
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
        # A vendor's build, such as 2.11.0a0+nv26.1, counts as the release that it precedes.
        if not needed.specifier.contains(Version(found).base_version, prereleases=True):
            return f"{needed.name} {found} is installed, but {needed} is needed: {remedy}"
    return ""
