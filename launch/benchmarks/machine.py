"""Say which machine and which versions figures were measured with."""

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from launch.benchmarks.measuring import CORES, CUDA

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "torchvision", "lightly", "kornia")


@dataclass(frozen=True)
class Head:
    """What stands above all figures of a file."""

    machine: dict[str, str | int | float | None]
    versions: dict[str, str | None]  # None is a package that is not installed
    date: str  # in UTC
    load: tuple[float, float, float]  # processes that wanted to run in the last 1, 5, 15 minutes


def read_head() -> Head:
    """Describe this machine as it is now."""
    machine: dict[str, str | int | float | None] = {
        "cpu": _read_cpu(),
        "cores": CORES,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "gpus": torch.cuda.device_count(),
    }
    versions = {"python": platform.python_version()}
    found = versions | {name: _find_version(name) for name in PACKAGES} | {"commit": _find_commit()}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Head(machine, found, date, os.getloadavg())


def _read_cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _find_commit() -> str | None:
    """Return the project's commit, with a + when files were changed, or None outside of git."""
    described = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
