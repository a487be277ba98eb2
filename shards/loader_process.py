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
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import IO, Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torchdata.nodes import BaseNode, IterableWrapper

from shards.ahead import Ahead
from shards.corrupt import Faults
from shards.decode_threads import count_processes
from shards.errors import InputError
from shards.loader import Assignment, Batch, DataConfig, TrainLoader, allocate
from shards.order import rank_streams
from shards.storage import files

AHEAD = 1  # batches that wait in this process, beside those that wait in the other one
TIED = "tied"  # the argument that ends the other process with the thread that started it
LENGTH = struct.Struct("<Q")  # of what follows, in bytes
PATIENCE = 2.0  # seconds that the other processes have to end
PIPE = 2**20  # bytes that may wait between the processes, where the system allows it

Small = tuple[NDArray[Any], ...]  # params, ids, labels and CRCs of a batch's rows


class ProcessLoader:
    """Iterates over the batches of `TrainLoader`s that work in processes of their own.

    The processes share out the streams. They start at once, and `close` ends them. They also end
    when this one does, however that comes about. The iteration raises what another process raised,
    and ChildProcessError when one ended without a word.
    """

    def __init__(
        self,
        assignment: Assignment,
        report: Callable[[str], None],
        *,
        pin_memory: bool = False,
        processes: int = 1,
    ) -> None:
        """Start the processes. The other arguments are those of `TrainLoader`."""
        self.assignment = assignment
        self._pin_memory, self._report = pin_memory, report
        streams = assignment.streams
        self._parts = [rank_streams(len(streams), i, processes) for i in range(processes)]
        self._told: set[str] = set()
        self._awaited = 0  # the process that the next rows come from
        samples, corrupt = assignment.order.index.samples, assignment.config.corrupt
        self._faults = Faults(samples, corrupt, report)
        packed = [
            _pack_arguments(assignment._replace(streams=streams[part.start : part.stop]))
            for part in self._parts
        ]
        started = [_start_child() for _ in packed]
        self._children = [child for child, _ in started]
        for child, arguments in zip(self._children, packed, strict=True):
            _send_arguments(child, arguments)
        received: BaseNode[Batch | Exception] = IterableWrapper(
            self._receive([results for _, results in started])
        )
        self._batches: Ahead[Batch | Exception] | None = Ahead(received, AHEAD)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        result = next(self._batches)
        if isinstance(result, Exception):
            raise result
        return result

    def wait(self, seconds: float) -> bool:
        """Wait until the next batch is there, or a fault. Return False when it takes longer."""
        return self._batches is None or self._batches.wait(seconds)

    def describe_wait(self) -> str:
        """Say what a long wait may come from."""
        process = self._children[self._awaited].pid
        who = f"process {process} on {socket.gethostname()}, which loads them,"
        if _is_stopped(process):
            return f"{who} is stopped, and kill -CONT {process} lets it go on"
        place = files.redact(self.assignment.order.index.folder)
        return f"{who} sends nothing: does {place} answer?"

    def close(self) -> None:
        """End the processes, by SIGKILL when they do not answer; it ends stopped ones, too."""
        self._batches = None
        for child in self._children:
            _end_arguments(child)
        end = time.monotonic() + PATIENCE
        for child in self._children:
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    @property
    def undecodable(self) -> int:
        """The number of samples that could not be decoded so far."""
        return self._faults.count

    def _receive(self, pipes: list[FileIO]) -> Iterator[Batch | Exception]:
        """Yield the batches, and what ends them as a value."""
        with contextlib.ExitStack() as stack:
            for results in pipes:
                stack.enter_context(results)
            while True:
                batch = allocate(self.assignment.rows, self.assignment.views, self._pin_memory)
                for number, results in enumerate(pipes):
                    self._awaited = number
                    try:
                        end = self._receive_part(number, results, batch)
                    except EOFError:
                        end = ChildProcessError(_tell_end(self._children[number]))
                    if end is not None:
                        yield end
                        return
                yield batch

    def _receive_part(self, number: int, results: FileIO, batch: Batch) -> Exception | None:
        """Fill in the rows of a process's streams; return what it raised, if anything."""
        while True:
            kind, content = pickle.loads(_read_message(results))
            if kind == "report":
                if content not in self._told:  # all processes find that a cache's disk is full
                    self._told.add(content)
                    self._report(content)
            elif kind == "failed":
                error: Exception = content
                return error
            elif kind == "undecodable":  # counted here, for what all processes find together
                try:
                    self._faults.record(*content)
                except InputError as too_many:
                    return too_many
            else:
                self._fill(self._parts[number], results, batch, content)
                return None

    def _fill(self, part: range, results: FileIO, batch: Batch, small: Small) -> None:
        """Fill in the rows of some streams: the views from the file, and the rest from arrays.

        The file has the views in the order [V, M, streams, rows of a stream in a micro-batch].
        """

        micro, streams = self.assignment.micro, len(self.assignment.streams)

        def rows(values: Tensor | NDArray[Any], axis: int) -> Any:
            """Split the `axis` of B rows into [M, streams, ...], and take these streams."""
            before, after = values.shape[:axis], values.shape[axis + 1 :]
            grid = values.reshape(*before, micro, streams, -1, *after)
            return grid[(slice(None),) * (axis + 1) + (slice(part.start, part.stop),)]

        params, ids, labels, crcs = small
        for whole, own, axis in (
            (batch.params.numpy(), params, 1),
            (batch.ids, ids, 0),
            (batch.labels.numpy(), labels, 0),
            (batch.crcs, crcs, 0),
        ):
            place = rows(whole, axis)
            place[...] = own.reshape(place.shape)
        for view in rows(batch.views.permute(0, 1, 3, 4, 2), 1):
            for micro_batch in view:
                _read_into(results, micro_batch.numpy().data.cast("B"))


Loader = TrainLoader | ProcessLoader


def loads_apart(config: DataConfig, url: str, cuda: bool) -> bool:
    """Return whether the loader works in a process of its own.

    Args:
        url: Where the shards are.
        cuda: Whether training works on a GPU.

    Raises InputError when they are in the memory of this process, and it has to be another one.
    """
    here = url.startswith("memory://")
    if config.own_process and here:
        raise InputError(
            f"data.own_process: {files.redact(url)} is in the memory of the training's process, "
            "which no other one can read: leave --data.own-process out"
        )
    apart = cuda if config.own_process is None else config.own_process
    return apart and not here and config.decode == "cpu"


def open_loader(
    assignment: Assignment, device: torch.device, report: Callable[[str], None]
) -> Loader:
    """Open the loader of a training on `device`, in a process of its own where that is faster.

    Raises InputError as `loads_apart` does.
    """
    order, streams, views, config, threads, *_ = assignment
    cuda = device.type == "cuda"
    if loads_apart(config, order.index.folder, cuda):
        pixels = len(views.views) * views.size**2
        processes = count_processes(threads, order.index, pixels, len(streams))
        return ProcessLoader(assignment, report, pin_memory=cuda, processes=processes)
    return TrainLoader(assignment, report, pin_memory=cuda, device=device)


def _is_stopped(process: int) -> bool:
    """Return whether a process is known to be stopped, as by SIGSTOP or a debugger."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] in "Tt"


def _tell_end(child: subprocess.Popen[bytes]) -> str:
    status = child.wait()
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


def _start_child() -> tuple[subprocess.Popen[bytes], FileIO]:
    """Start the other process; return it, and the file that its messages come from."""
    read, write = os.pipe()
    results = FileIO(read)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):  # the user has used up what a user may have
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE)
    program = str(Path(__file__).with_name("loader_child.py"))
    # The main thread ends with its process. Linux ends the child with the thread that started it.
    tied = threading.current_thread() is threading.main_thread()
    try:
        child = subprocess.Popen(
            # -P: it must not import a pickle.py or a torch.py of the folder that it works in.
            [sys.executable, "-P", program, str(write), *[TIED] * tied],
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
