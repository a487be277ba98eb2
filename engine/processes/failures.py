"""What is told of a failure, by the process that failed first."""

import re
import sys
import time
import traceback

import torch.distributed as dist

from engine.processes.world import from_launcher, rank, shared_store
from shards.errors import InputError


def report_failure(error: BaseException) -> None:
    """Tell of an error on stderr, unless another process of the run has failed before this one.

    What fails after the first is most often a consequence: a closed connection. A user's mistake
    is one line, which the first process tells when all have found it.
    """
    known = isinstance(error, InputError | OSError)
    if not dist.is_initialized():
        if from_launcher("LOCAL_RANK", 0) != 0 and known:
            # Most likely all found it, before they met. The machine's first tells, and its end is
            # everybody's; who is still there after this while is the only one.
            time.sleep(30)
    elif not _is_first_failure(patience=1.0 if known and rank() != 0 else 0.0):
        return
    if known:
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif _is_lost_connection(error):
        reason = re.sub(r"^\[[^]]*\] *", "", str(error).strip().splitlines()[0])
        print(f"error: rank {rank()} lost another process: {reason}", file=sys.stderr, flush=True)
    else:
        if dist.is_initialized():
            print(f"rank {rank()} failed:", file=sys.stderr)
        traceback.print_exception(error)
        sys.stderr.flush()


def _is_lost_connection(error: BaseException) -> bool:
    signs = (
        *("closed by peer", "connection was likely closed", "connection reset", "broken pipe"),
        *("connection refused", "failed to recv", "socket closed"),
        *("timed out waiting", "collective operation timeout"),
    )
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _is_first_failure(patience: float) -> bool:
    time.sleep(patience)
    try:
        return int(shared_store().add("failures", 1)) == 1
    except (RuntimeError, ValueError):  # the store went away with its host
        return rank() == 0
