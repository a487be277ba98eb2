"""A process counts the cores that it may use, not those of the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.processes import cores
from tests.helpers.places import ROOT

MANY = 64


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 cores and the root of its cgroups. Its process is in none at first."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)), raising=False)
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_without_limits_all_cores_count(machine: Path) -> None:
    assert cores.available_cores() == MANY
    put(machine / "own", "0::/\n")
    put(machine / "cgroup" / "cpu.max", "max 100000\n")
    assert cores.available_cores() == MANY


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("damaged", MANY)],
)
def test_a_quota_counts(machine: Path, quota: str, expected: int) -> None:
    put(machine / "own", "0::/\n")
    put(machine / "cgroup" / "cpu.max", f"{quota}\n")
    assert cores.available_cores() == expected


def test_the_smallest_quota_on_the_way_to_the_root_counts(machine: Path) -> None:
    put(machine / "own", "0::/slurm/job_7/step_0\n")
    put(machine / "cgroup" / "slurm" / "cpu.max", "3200000 100000\n")
    put(machine / "cgroup" / "slurm" / "job_7" / "cpu.max", "800000 100000\n")
    put(machine / "cgroup" / "slurm" / "job_7" / "step_0" / "cpu.max", "max 100000\n")
    put(machine / "cgroup" / "slurm" / "job_8" / "cpu.max", "100000 100000\n")  # another's
    assert cores.available_cores() == 8


def test_the_first_version_of_cgroups(machine: Path) -> None:
    put(machine / "own", "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/\n")
    put(machine / "cgroup" / "cpu" / "cpu.cfs_quota_us", "600000\n")  # the container's own root
    put(machine / "cgroup" / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert cores.available_cores() == 6
    put(machine / "cgroup" / "cpu" / "cpu.cfs_quota_us", "-1\n")
    assert cores.available_cores() == MANY


def test_affinity_counts_in_a_real_process() -> None:
    first = min(os.sched_getaffinity(0))
    script = (
        f"import os; os.sched_setaffinity(0, {{{first}}}); os.cpu_count = lambda: 64\n"
        "from engine.processes.cores import available_cores; print(available_cores())"
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "1"
