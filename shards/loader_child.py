"""Run the loader of a training in this process; shards/loader_process.py starts it.

It reads the loader's arguments from its standard input, writes batches to the pipe whose number it
is given, and ends when its input does. On Linux it ends even while it is stopped, when it is told
that the thread that started it lives as long as the training does.
"""

import gc
import signal

if __name__ == "__main__":
    # The process that trains decides what a signal means. These come to every process of a job.
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(_number, signal.SIG_IGN)

import ctypes
import os
import pickle
import sys
import threading
import traceback
from contextlib import suppress
from io import FileIO

_PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


def main(pipe: int) -> None:
    """Serve batches until nobody takes them any more."""
    try:
        sys.path[:], content = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):  # the process that trains ended while it sent them
        return
    threading.Thread(target=_end_with_input, daemon=True).start()
    # Only now, so that the process that trains need not wait until all of this is imported. The
    # garbage collector would take a sixth of that time, and find nothing.
    gc.disable()
    import torch

    from shards.allocation import keep_freed_memory
    from shards.decode import DecodeError
    from shards.loader import TrainLoader
    from shards.loader_process import write_message

    gc.freeze()
    gc.enable()
    keep_freed_memory()
    results, lock = FileIO(pipe, "wb"), threading.Lock()

    def report(text: str) -> None:
        with lock:
            write_message(results, ("report", text))

    told: set[int] = set()

    def record(sample_id: int, name: str, reason: DecodeError) -> None:
        with lock:
            if sample_id not in told:
                told.add(sample_id)
                write_message(results, ("undecodable", (sample_id, name, str(reason))))

    with suppress(BrokenPipeError):
        try:
            assignment = pickle.loads(content)
            torch.set_num_threads(max(1, assignment.threads))
            for batch in TrainLoader(assignment, report, record=record):
                pixels = batch.views.permute(0, 1, 3, 4, 2)  # [V, B, S, S, 3], contiguous
                small = batch.params.numpy(), batch.ids, batch.labels.numpy(), batch.crcs
                with lock:
                    write_message(results, ("batch", small), pixels.numpy().data.cast("B"))
        except Exception as error:
            with lock:
                write_message(results, ("failed", _portable(error)))


def _end_with_parent() -> None:
    """Let Linux kill this process when the thread that started it ends, even by SIGKILL."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _portable(error: Exception) -> Exception:
    """Return the error, or a RuntimeError with its text when it cannot be sent as it is."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


if __name__ == "__main__":
    if sys.argv[2:]:
        _end_with_parent()
    main(int(sys.argv[1]))
    os._exit(0)  # its threads may be in the middle of something
