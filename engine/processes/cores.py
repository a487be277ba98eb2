"""Count the cores that this process may use, which can be far fewer than the machine has."""

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Return the number of cores that this process may use, at least one.

    A scheduler limits a process to some of the machine's cores (its affinity, set by Slurm or
    taskset), or to a share of their time (the quota of its cgroup, set by Kubernetes or Docker).
    With a quota of 2.5 cores, 2 threads run all the time, and a third would make all of them wait.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS has neither affinities nor cgroups
        cores = os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """Yield the quotas, in cores, of this process's cgroup and of those that it lies in."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # cgroup v2
            root = _CGROUPS
        elif "cpu" in controllers.split(","):
            root = _CGROUPS / "cpu"
        else:
            continue
        # In a container the path may be that of the host, which is not visible. The container's
        # own limits then stand in the root.
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(root):
                yield from _quota(place)


def _quota(folder: Path) -> Iterator[float]:
    """Yield the quota of one cgroup in cores, or nothing when it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        if int(quota) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" or -1 is no quota
        return
