"""Mount disks of a few MB, where that is allowed, to see what a full disk does."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """Make `folder` a disk of this size during the block, or skip the test."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def forbid_writing(folder: Path) -> None:
    """Make the disk at `folder` read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def resize(folder: Path, kilobytes: int) -> None:
    """Give the disk at `folder` another size."""
    options = f"remount,size={kilobytes}k"
    subprocess.run(["mount", "-o", options, str(folder)], check=True)
