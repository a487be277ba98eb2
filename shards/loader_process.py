"""Load the batches of a training in a process of their own, beside a GPU.

Python's lock lets one thread at a time run Python. In a step, the thread that trains starts about
two thousand kernels of a GPU, and takes the lock again after each of them. It waits each time for
threads of the same process that decode photos. Beside them a step on an H100 took twice as long.
"""

import contextlib
import fcntl
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchdata.nodes import BaseNode, IterableWrapper, Prefetcher

from shards.loader import Batch, DataConfig, TrainLoader, estimate_block_memory
from shards.order import Order
from shards.views import ViewsConfig

AHEAD = 1  # batches that wait in this process, beside those that wait in the other one
LENGTH = struct.Struct("<Q")  # of what follows, in bytes
PIPE = 2**20  # bytes that may wait between the processes, where the system allows it


class ProcessLoader:
    """Iterates over the batches of a `TrainLoader` that works in a process of its own.

    The process starts at once, and `close` ends it. It also ends when this one does, however that
    comes about. The iteration raises what the other process raised, and ChildProcessError when it
    ended without a word.
    """

    def __init__(
        self,
        order: Order,
        streams: range,
        views: ViewsConfig,
        config: DataConfig,
        *,
        micro: int,
        start: int,
        threads: int,
        pin_memory: bool,
        report: Callable[[str], None],
    ) -> None:
        """Start the process. The arguments are those of `TrainLoader`."""
        self.order, self.streams, self._prefetch = order, streams, config.prefetch
        self._pin_memory, self._report = pin_memory, report
        self.undecodable = 0  # samples that could not be decoded so far
        options = {"micro": micro, "start": start, "threads": threads}
        arguments = _pack_arguments(((order, streams, views, config), options))
        self._child, results = _start_child()
        _send_arguments(self._child, arguments)
        received: BaseNode[Batch | Exception] = IterableWrapper(self._receive(results))
        self._batches: Prefetcher[Batch | Exception] | None = Prefetcher(
            received, prefetch_factor=AHEAD, snapshot_frequency=0
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        result: Batch | Exception = next(self._batches)
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """End the process."""
        self._batches = None
        _end_arguments(self._child)
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    @property
    def block_memory(self) -> int:
        """Estimate of the most block bytes that the process holds; see `TrainLoader`."""
        return estimate_block_memory(self.order.index, len(self.streams), self._prefetch)

    def _receive(self, results: FileIO) -> Iterator[Batch | Exception]:
        """Yield the batches, and what ends them as a value."""
        with results:
            try:
                while True:
                    kind, content = pickle.loads(_read_message(results))
                    if kind == "report":
                        self._report(content)
                    elif kind == "batch":
                        yield self._read_batch(results, *content)
                    else:
                        yield content
                        return
            except EOFError:
                yield ChildProcessError(self._tell_end())

    def _read_batch(
        self,
        results: FileIO,
        undecodable: int,
        shape: tuple[int, ...],
        params: NDArray[np.float32],
        ids: NDArray[np.int64],
        labels: NDArray[np.int64],
        crcs: NDArray[np.uint32],
    ) -> Batch:
        """Read the views [V, B, S, S, 3] that follow a message, and put the batch together."""
        self.undecodable = undecodable
        views = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        _read_into(results, views.numpy().data.cast("B"))
        return Batch(
            views.permute(0, 1, 4, 2, 3), self._copy(params), ids, self._copy(labels), crcs
        )

    def _copy(self, values: NDArray[Any]) -> Tensor:
        given = torch.from_numpy(values)
        return torch.empty_like(given, pin_memory=self._pin_memory).copy_(given)

    def _tell_end(self) -> str:
        status = self._child.wait()
        how = f"with exit status {status}"
        if status < 0:
            how = f"by signal {-status} ({_name_signal(-status)})"
        return (
            f"the process that loads the images ended {how}: when memory is short, the system ends "
            "the largest process, and free -h lists what is left; a lower --threads takes less, in "
            "a training also a lower --data.prefetch, or --data.own-process False, which loads in "
            "the training's process"
        )


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # Python names the first and the last signal of real time alone
        return "a signal of real time"


Loader = TrainLoader | ProcessLoader


def loads_apart(config: DataConfig, cuda: bool) -> bool:
    """Return whether the loader works in a process of its own; `cuda` is where training works."""
    apart = cuda if config.own_process is None else config.own_process
    return apart and config.decode == "cpu"


def open_loader(
    order: Order,
    streams: range,
    views: ViewsConfig,
    config: DataConfig,
    *,
    micro: int,
    start: int,
    threads: int,
    device: torch.device,
    report: Callable[[str], None],
) -> Loader:
    """Open the loader of a training on `device`, in a process of its own where that is faster.

    The arguments are those of `TrainLoader`.
    """
    cuda = device.type == "cuda"
    options: dict[str, Any] = {"micro": micro, "start": start, "threads": threads}
    options |= {"pin_memory": cuda, "report": report}
    if loads_apart(config, cuda):
        return ProcessLoader(order, streams, views, config, **options)
    return TrainLoader(order, streams, views, config, **options, device=device)


def _start_child() -> tuple[subprocess.Popen[bytes], FileIO]:
    """Start the other process; return it, and the file that its messages come from."""
    read, write = os.pipe()
    results = FileIO(read)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):  # the user has used up what a user may have
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE)
    program = str(Path(__file__).with_name("loader_child.py"))
    try:
        child = subprocess.Popen(
            # -P: it must not import a pickle.py or a torch.py of the folder that it works in.
            [sys.executable, "-P", program, str(write)],
            stdin=subprocess.PIPE,
            pass_fds=[write],
            start_new_session=True,  # a Ctrl-C is for the process that trains
        )
    except BaseException:
        results.close()
        raise
    finally:
        os.close(write)
    return child, results


def _pack_arguments(arguments: object) -> bytes:
    """Pack what the loader is made of, with the folders that this process imports from.

    The last one is where this package is, which need not be installed.
    """
    return pickle.dumps(([*sys.path, str(Path(__file__).parents[1])], pickle.dumps(arguments)))


def _send_arguments(child: subprocess.Popen[bytes], arguments: bytes) -> None:
    """Send the arguments. The other process reads them before it imports anything."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its end is told when a batch is asked for
        child.stdin.write(arguments)
        child.stdin.flush()


def _end_arguments(child: subprocess.Popen[bytes]) -> None:
    """Close the other process's input, which tells it to end."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()


def write_message(results: IO[bytes], content: object, pixels: memoryview | None = None) -> None:
    """Write a message, and the pixels that follow it, if any. The file has no buffer."""
    message = pickle.dumps(content)
    for part in (memoryview(LENGTH.pack(len(message)) + message), pixels):
        while part:
            part = part[results.write(part) :]


def _read_message(results: FileIO) -> bytearray:
    """Read a message. Raises EOFError at the end of the file."""
    length = bytearray(LENGTH.size)
    _read_into(results, memoryview(length))
    message = bytearray(LENGTH.unpack(length)[0])
    _read_into(results, memoryview(message))
    return message


def _read_into(results: FileIO, space: memoryview) -> None:
    """Fill `space` from the file. Raises EOFError when the file ends before."""
    while space:
        count = results.readinto(space)
        if not count:
            raise EOFError
        space = space[count:]
