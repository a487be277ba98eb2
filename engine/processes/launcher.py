"""Find this process's place among those of a job, by the variables that a launcher such as torchrun
sets, and connect to the store at the launcher's address."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from shards.errors import InputError

LONG = 20.0  # seconds; who waits longer for the other processes says so

_MEND = "start the processes with torchrun, which sets it, or unset RANK and WORLD_SIZE"


def read_variable(name: str, default: int) -> int:
    """Return the number in a variable of the environment.

    Raises InputError when it holds something else.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise InputError(f"the variable {name} is {text!r}, no number: {_MEND}") from None


def rank() -> int:
    """Return this process's rank; it works before anything is set up."""
    return read_variable("RANK", 0)


def check_variables() -> None:
    """Raise InputError when the variables contradict each other, as where some are left over."""
    size = read_variable("WORLD_SIZE", 1)
    if size < 1:
        raise InputError(f"the variable WORLD_SIZE is {size}: {_MEND}")
    for name, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        most, number = read_variable(count, 1), read_variable(name, 0)
        known = count in os.environ or name == "RANK"  # Some launchers set LOCAL_RANK alone.
        if known and not 0 <= number < most:
            raise InputError(f"{name} is {number}, but {count} is {most}: {_MEND}")


def connect(timeout: timedelta) -> Store:
    """Create the store at the launcher's address; a single process without one gets its own.

    Raises InputError when nobody can meet there.
    """
    size = read_variable("WORLD_SIZE", 1)
    if "MASTER_ADDR" not in os.environ:
        if size > 1:
            raise InputError(
                f"WORLD_SIZE is {size}, but MASTER_ADDR is not set, which says where the processes "
                f"meet: {_MEND}"
            )
        return HashStore()
    port = read_variable("MASTER_PORT", -1)
    if not 0 <= port < 2**16:
        told = f"is {port}" if "MASTER_PORT" in os.environ else "is not set"
        raise InputError(f"MASTER_ADDR is set, but MASTER_PORT {told}: {_MEND}")
    place = f"{os.environ['MASTER_ADDR']}:{port}"
    try:
        store: Store = next(rendezvous("env://", rank(), size, timeout=timeout))[0]
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).strip().partition("\n")[0]
        if "EADDRINUSE" in reason or "address already in use" in reason:
            raise InputError(
                f"another program uses port {port} of this machine, where the processes would "
                "meet: give another MASTER_PORT"
            ) from None
        raise InputError(
            f"no connection to the other processes at {place} (MASTER_ADDR:MASTER_PORT): {reason}"
        ) from None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store  # the first process hosts it
    # torchrun keeps one store over its restarts. A process must not find the keys that an earlier
    # attempt left there, such as the addresses of its processes.
    return PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def telling_long_waits() -> Iterator[None]:
    """Say where this process waits for the others, when the block takes long."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    text = (
        f"rank {rank()} on {socket.gethostname()} waits for the other processes "
        f"({os.environ.get('WORLD_SIZE', 1)} in all) at {place}"
    )
    timer = Timer(LONG, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    if read_variable("LOCAL_RANK", 0) == 0 and "MASTER_ADDR" in os.environ:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
