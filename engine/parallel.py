"""Where a process computes: its device, its threads, what it compiles."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from engine.byol import Online, Target
from shards.errors import InputError
from shards.fields import Operation


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread over devices."""

    strategy: Operation[Literal["auto"]] = "auto"
    """auto: one process, on the GPU when there is one."""


def setup(threads: int) -> torch.device:
    """Take the device and set torch's threads. Raises InputError for more than one process."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise InputError(
            f"started as {world} processes, but parallel.strategy auto runs one: "
            "use torchrun --nproc-per-node=1 --nnodes=1"
        )
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Equal runs are equal bit for bit: no timing decides which kernel is used.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def compile_networks(online: Online, target: Target, report: Callable[[str], None]) -> None:
    """Compile both networks' forwards in place, so that parameter names stay as they are.

    Where there is no compiler for the CPU, says so and leaves them eager.
    """
    if not torch.cuda.is_available() and not shutil.which(os.environ.get("CXX", "g++")):
        report("compile: no C++ compiler (g++) found; going on without torch.compile")
        return
    online.compile()
    target.compile()
