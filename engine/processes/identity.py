"""Which process is which, over machines and restarts, and whether one is known to be dead."""

import functools
import os
import uuid
from pathlib import Path

_PROC = Path("/proc")


def agent_identity() -> str:
    """What launched this process: torchrun's agent, which outlives restarts, or the process itself.

    Tells the machine since its boot, the process's namespace and number, and when it was started.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return identity(os.getppid() if by_torchrun else os.getpid())


def identity(pid: int) -> str:
    """Of a process of this machine, like no other's since the machine's boot."""
    try:
        return f"{_machine()}:{pid}:{_state(pid)[1]}"
    except OSError:  # no Linux: nobody can tell whether this process is dead
        return f"{_this_process()}:{pid}"


def is_dead(identity: str) -> bool:
    """Whether a process is known to be dead; False where this machine cannot tell."""
    try:
        machine, pid, start = identity.rsplit(":", 2)
        if machine != _machine():
            return False
        os.kill(int(pid), 0)
        state, started = _state(int(pid))
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # it is hidden from this user, or no such identity
        return False
    return state in "ZX" or started != start


def _machine() -> str:
    """Where a process number means one process: this boot of the machine, and the namespace."""
    # Host names are often alike, and so is the number of every machine's first namespace.
    boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{(_PROC / 'self/ns/pid').stat().st_ino}"


def _state(pid: int) -> tuple[str, str]:
    """State letter, and start in clock ticks since the boot. Raises OSError if there is none."""
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]  # fields 3 and 22: the name before them may hold spaces


@functools.cache
def _this_process() -> str:
    return uuid.uuid4().hex
