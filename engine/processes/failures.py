"""Report a failure, once, by the process that failed first."""

import os
import re
import sys
import time
import traceback
from shutil import disk_usage
from tempfile import gettempdir

import torch.distributed as dist

from engine.processes.launcher import rank
from engine.processes.world import shared_store
from shards.errors import InputError, printable
from shards.storage.space import FULL, format_size

_TOO_LATE = "timed out waiting", "collective operation timeout"


def report_failure(error: BaseException) -> None:
    """Print an error on stderr, unless another process of the run has failed before this one.

    Later failures are mostly consequences of the first, such as a closed connection. A user's
    mistake is printed as one line. When all processes found it, the first process prints it.
    """
    known = isinstance(error, InputError | OSError)
    if not dist.is_initialized():
        if os.environ.get("LOCAL_RANK", "0") != "0" and known:
            # Most likely all processes found the error, before they connected. Then the first
            # process of the machine prints it and ends, and torchrun ends the others. A process
            # that is still alive after this wait is the only one that failed, so it prints it.
            time.sleep(30)
    elif not _is_first_failure(patience=1.0 if known and rank() != 0 else 0.0):
        return
    if known:
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
    elif _is_lost_connection(error):
        reason = re.sub(r"^\[[^]]*\] *", "", str(error).strip().splitlines()[0])
        reason = reason.partition(". This is typically")[0]  # gloo's guesses at the cause
        if any(sign in reason.lower() for sign in _TOO_LATE):
            reason += (
                ": it hangs, or works for longer than the others wait (--parallel.timeout of a "
                "training)"
            )
        print(f"error: rank {rank()} lost another process: {reason}", file=sys.stderr, flush=True)
    elif full := _find_full_gpu(error) or _find_full_memory(error) or _find_full_disk(error):
        print(f"error: {full}", file=sys.stderr, flush=True)
    else:
        if dist.is_initialized():
            print(f"rank {rank()} failed:", file=sys.stderr)
        traceback.print_exception(error)
        sys.stderr.flush()


def _find_full_gpu(error: BaseException) -> str:
    """Describe a failure because a GPU's memory is full; "" for any other failure.

    Torch has a type for its own allocator's failures. Those of CUDA, cuDNN and cuBLAS, and of a
    thread of the loader, only have their texts.
    """
    text = " ".join(str(error).split())
    told = re.search(
        r"CUDA out of memory.*? is free|CUDA error: out of memory|\w+_ALLOC_FAILED", text
    )
    if not isinstance(error, RuntimeError) or told is None:
        return ""
    return (
        f"{told[0]}: send the batch through the networks in parts by a larger --batch.micro, or "
        "compute blocks again by --parallel.recompute (--explain tells what a training needs); "
        "give an evaluation a smaller --batch; nvidia-smi lists what else takes this GPU's memory"
    )


def _find_full_memory(error: BaseException) -> str:
    """Describe a failure because a machine's memory is full; "" for any other failure.

    Python and numpy have a type for it. Torch's allocator of the CPU only has its text.
    """
    text = str(error)
    if not isinstance(error, MemoryError) and "can't allocate memory" not in text:
        return ""
    told = re.search(r"allocate ([0-9]+) bytes|allocate ([0-9.]+ \w+) for", text)
    size = "" if told is None else f" for {told[2] or format_size(int(told[1]))} more"
    return (
        f"rank {rank()}: the memory of this machine has no room{size}: send the batch through the "
        "networks in parts by a larger --batch.micro, or load less ahead by a smaller "
        "--data.prefetch (--explain tells what a training needs); give an evaluation a smaller "
        "--batch; free -h lists what is left"
    )


def _find_full_disk(error: BaseException) -> str:
    """Describe a failure of torch.compile on a full disk; "" for any other failure.

    The compiler is another program, so only its output tells.
    """
    if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return ""
    text = str(error)
    told = [os.strerror(number) for number in FULL if os.strerror(number) in text]
    if not told:
        return ""
    folders = {os.environ.get("TORCHINDUCTOR_CACHE_DIR") or gettempdir(), gettempdir()}
    space = ", ".join(
        f"{folder} has {format_size(disk_usage(folder).free)} free"
        for folder in sorted(filter(os.path.isdir, folders))
    )
    return (
        f"torch.compile: {told[0]} ({space}): make room, set TMPDIR and TORCHINDUCTOR_CACHE_DIR to "
        "folders on another disk, or use --no-compile"
    )


def _is_lost_connection(error: BaseException) -> bool:
    signs = (
        *("closed by peer", "connection was likely closed", "connection reset", "broken pipe"),
        *("connection refused", "failed to recv", "socket closed"),
        *_TOO_LATE,
        *("remote process exit", "communicator was aborted"),  # NCCL says so, and gloo the others
    )
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _is_first_failure(patience: float) -> bool:
    time.sleep(patience)
    try:
        return int(shared_store().add("failures", 1)) == 1
    except (RuntimeError, ValueError):  # the store ended with the process that hosted it
        return rank() == 0
