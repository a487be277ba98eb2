"""Measure the costs of sides that take turns."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from engine.processes.cores import available_cores
from shards.errors import InputError

CUDA = torch.cuda.is_available()
CORES = available_cores()

_T = TypeVar("_T")


class Cost(NamedTuple):
    """The cost of an image."""

    wall: float  # seconds
    cpu: float  # core-seconds in this process and its workers
    memory: int  # peak bytes of the GPU, or of this process when there is no GPU

    def then(self, other: "Cost") -> "Cost":
        """Return the cost of this work followed by the other."""
        memory = max(self.memory, other.memory)
        return Cost(self.wall + other.wall, self.cpu + other.cpu, memory)


def measure(work: Callable[[], object], images: int) -> Cost:
    """Call `work`, which processes `images` images, and return the cost of each of them."""
    _reset_peak()
    wait()
    wall, cpu = time.perf_counter(), _cpu_seconds()
    work()
    wait()
    wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
    return Cost(wall / images, cpu / images, _peak())


def alternate(sides: Mapping[str, Callable[[], _T]], rounds: int) -> dict[str, list[_T]]:
    """Run every side once in each round, and return the costs that each side reports.

    Every other round runs the sides in reverse order.
    """
    costs: dict[str, list[_T]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            costs[name].append(sides[name]())
    return costs


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its living child processes."""
    seconds, parent = time.process_time(), str(os.getpid())
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended
            fields = path.read_text().rpartition(")")[2].split()
            if fields[1] == parent:
                seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def device_name() -> str:
    return torch.cuda.get_device_name() if CUDA else "cpu"


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_host_peak()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if CUDA else host_peak()


def reset_host_peak() -> int:
    """Reset this process's peak of RAM to what it holds now, and return that in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return host_peak()


def host_peak() -> int:
    """Return the most bytes that this process has held in RAM since `reset_host_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def require_positive(**fields: float) -> None:
    for name, value in fields.items():
        if value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
