"""Join the processes of a run, with one device each, and exchange data between them.

torchrun starts one process for each GPU, or any number of processes on a CPU. Without torchrun a
run has one process. Tensors on a GPU are sent by NCCL, everything else by gloo.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

from engine.processes import launcher
from engine.processes.alike import check_devices
from engine.processes.cores import available_cores
from engine.processes.launcher import read_variable
from shards.allocation import keep_freed_memory
from shards.errors import InputError
from shards.fields import differences

try:
    from torch.distributed import set_timeout as _set_timeout
except ImportError:  # older releases (2.11) have it by another name
    from torch.distributed.distributed_c10d import _set_pg_timeout as _set_timeout

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
START_TIMEOUT = 1800.0  # seconds; before the first step is done, some process may compile or fetch
LONGEST_TIMEOUT = 24 * 3600.0  # seconds; for work of unknown size that others wait for

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """Describe this process among those of the run; `local_size` counts those of its machine."""

    rank: int
    size: int
    local_size: int
    device: torch.device
    group: ProcessGroup | None = None  # None is the default group

    @property
    def main(self) -> bool:
        """Return whether this is the process that reports and writes."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Return whether there is a process group."""
        return dist.is_initialized()

    def duplicate(self) -> "World":
        """Return the same processes with a separate group, for a thread beside the training.

        All processes must call it at the same point.
        """
        if not self.distributed:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=START_TIMEOUT))
        return replace(self, group=cast(ProcessGroup, group))

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor, of the CPU or of the device, over all processes, in place."""
        if self.distributed:
            dist.all_reduce(values, group=self.group)
        return values

    def all_reduce_later(self, values: Tensor) -> Callable[[], Tensor]:
        """Start an `all_reduce`; the returned function waits for it and gives the sum."""
        if not self.distributed:
            return lambda: values
        work = dist.all_reduce(values, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return values

        return wait

    def on_main(self, make: Callable[[], _T]) -> _T:
        """Call `make` on the first process; return its result, or raise its error, on all.

        Only InputError and OSError are raised on all processes.
        """
        if not self.distributed:
            return make()
        made: list[_T | Exception | None] = [None]
        if self.main:
            try:
                made = [make()]
            except (InputError, OSError) as error:
                made = [error]
        dist.broadcast_object_list(made, src=0, group=self.group)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]  # type: ignore[return-value]

    def all_gather_object(self, own: _T) -> list[_T]:
        """Gather an object from each process on every process, in the order of their ranks."""
        if not self.distributed:
            return [own]
        found: list[_T | None] = [None] * self.size
        dist.all_gather_object(found, own, group=self.group)
        return found  # type: ignore[return-value]

    def on_all(self, make: Callable[[], _T], shared: bool = False) -> _T:
        """Call `make` on every process; return its own result, or raise the same error, on all.

        A process that raised alone would leave the others waiting for it. Only InputError and
        OSError are raised on all processes, and an InputError before others. Where some processes
        succeeded, the error names one that failed.

        Args:
            shared: The processes share out one piece of work, so that an InputError is no matter of
                the process that found it.
        """
        made: list[_T] = []
        fault: InputError | OSError | None = None
        try:
            made.append(make())
        except (InputError, OSError) as error:
            fault = error
        found = self.all_gather_object((fault, gethostname()))
        faults = [(one, rank, host) for rank, (one, host) in enumerate(found) if one is not None]
        for one, rank, host in sorted(faults, key=lambda f: not isinstance(f[0], InputError)):
            anybody = len(faults) == self.size or (shared and isinstance(one, InputError))
            raise one if anybody else _place(one, f"rank {rank} on {host}")
        return made[0]

    def all_gather(self, rows: Tensor) -> Tensor:
        """Gather the rows [n, ...] of all processes, in the order of their ranks; n may differ."""
        if not self.distributed:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        self.all_reduce(counts)
        padded = rows.new_zeros((int(counts.max()), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, counts.tolist(), strict=True)])

    def all_to_all(self, parts: Tensor) -> Tensor:
        """Send part i of [W, ...] to process i; return what each process sent here, [W, ...]."""
        if not self.distributed:
            return parts
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=self.group)
        return received


def _place(error: InputError | OSError, place: str) -> InputError | OSError:
    """Return the same error with the place where it was raised in its text."""
    text = str(error)
    if place in text:
        return error
    try:
        placed = type(error)(f"{text} (told by {place})")
    except TypeError:  # a library's error that is made otherwise
        return error
    if isinstance(error, OSError) and isinstance(placed, OSError):
        placed.errno = error.errno  # by which others tell a full disk
    return placed


@contextmanager
def enter(threads: int | None, distributed: bool) -> Iterator[World]:
    """Join the processes of a run, as `join` does, and leave them at the end."""
    yield join(threads, distributed)
    # After a failure the group must stay, because report_failure asks its store who failed first.
    leave()


def join(threads: int | None, distributed: bool) -> World:
    """Select the device, set torch's threads and the allocator, and connect to the other processes.

    Args:
        threads: Threads of torch on the CPU. None shares the usable cores out.
        distributed: Make a process group even for a single process.

    Raises InputError when the launcher's variables contradict each other, when this machine has
    fewer GPUs than processes, and when some processes have a GPU and others have none.
    """
    launcher.check_variables()
    size, local_size = read_variable("WORLD_SIZE", 1), read_variable("LOCAL_WORLD_SIZE", 1)
    local_rank = read_variable("LOCAL_RANK", 0)
    torch.set_num_threads(threads or share_of_cores())
    keep_freed_memory()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"{local_size} processes on a machine with {torch.cuda.device_count()} GPUs: "
                f"use torchrun --nproc-per-node={torch.cuda.device_count()}"
            )
        # Timings must not decide which kernel is used, so that equal runs are equal bit for bit.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    world = World(launcher.rank(), size, local_size, device)
    if (size > 1 or distributed) and not dist.is_initialized():
        timeout = timedelta(seconds=START_TIMEOUT)
        with launcher.telling_long_waits():
            store = launcher.connect(timeout)
            check_devices(store, device, size)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=world.rank,
                world_size=size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
    return world


def find_unused_gpu(device: torch.device) -> str:
    """Say that torch cannot use this machine's GPU; "" when it does, or when there is none.

    A torch that is built without CUDA says nothing of itself, and the CPU takes its place.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # by the user
    if device.type == "cuda" or hidden or not _NVIDIA_DRIVER.exists():
        return ""
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
    return (
        f"torch {torch.__version__}, which {built}, finds no GPU that it can use, though NVIDIA's "
        "driver runs here: going on on the CPU (nvidia-smi tells which CUDA the driver knows, and "
        "a container has to be given the GPU)"
    )


def leave() -> None:
    """Leave the other processes by destroying the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_alike(world: World, facts: dict[str, Any]) -> None:
    """Raise InputError on every process when the `facts` of two processes differ."""
    found = world.all_gather_object(facts)
    for rank, there in enumerate(found):
        if listed := differences(there, found[0]):
            raise InputError(
                f"processes were started for different runs ({'; '.join(listed)}; here is rank 0, "
                f"there rank {rank}): start every machine with the same "
                "command, code and data"
            )


def share_of_cores() -> int:
    """Return the number of usable cores for each process of this machine, at least one."""
    return max(1, available_cores() // read_variable("LOCAL_WORLD_SIZE", 1))


def set_timeout(seconds: float, groups: Iterable[ProcessGroup]) -> None:
    """Set how long a process waits for the others, in the default group and in `groups`."""
    if dist.is_initialized():
        for group in (None, *groups):
            _set_timeout(timedelta(seconds=seconds), group)


@contextmanager
def waiting_for_hours() -> Iterator[None]:
    """Let the processes wait in the block for one that works for hours, as when it packs images.

    All processes enter it together, before the first step.
    """
    set_timeout(LONGEST_TIMEOUT, [])
    try:
        yield
    finally:
        set_timeout(START_TIMEOUT, [])


def shared_store() -> Store:
    """Return the store through which the processes of this attempt connected."""
    return dist.distributed_c10d._get_default_store()
