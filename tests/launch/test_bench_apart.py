"""Another project's sides run in a process of their own, with PyTorch's own settings."""

import os
import signal

import pytest
import torch

from launch.benchmarks.apart import Work, apart
from launch.benchmarks.measuring import Cost


def build(given: torch.Tensor) -> Work:
    def die() -> Cost:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    return {
        "look": lambda: Cost(float(os.getpid()), torch.get_num_threads(), int(given.sum())),
        "die": die,
    }


def refuse(name: str) -> Work:
    raise ImportError(f"No module named {name}")


def test_sides_are_measured_in_their_own_process() -> None:
    with apart(build, torch.arange(5), threads=3) as work:
        there, threads, total = work["look"]()
        assert (threads, total) == (3, 10)
        assert there != os.getpid()
        assert work["look"]().wall == there
        os.kill(int(there), 0)
        with pytest.raises(RuntimeError, match="ended: see above"):
            work["die"]()
    with pytest.raises(ProcessLookupError):
        os.kill(int(there), 0)


def test_a_peer_that_is_missing_is_missing_here() -> None:
    with (
        pytest.raises(ImportError, match="No module named peer"),
        apart(refuse, "peer", threads=1),
    ):
        pass
