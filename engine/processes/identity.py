"""Identify processes across machines and restarts, and tell whether one is known to be dead."""

import functools
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")


def agent_identity() -> str:
    """Identify what launched this process: torchrun's agent, or else the process itself.

    The agent outlives the restarts of its processes. The identity holds the machine's boot, the
    process's namespace and number, and the time of its start.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return identity(os.getppid() if by_torchrun else os.getpid())


def identity(pid: int) -> str:
    """Return an identity of a process of this machine that no other process has."""
    try:
        return f"{_machine()}:{pid}:{_state(pid)[1]}"
    except OSError:  # not Linux: nobody can tell whether this process is dead
        return f"{_this_process()}:{pid}"


def find_pids(identities: Iterable[str]) -> list[int]:
    """Return the numbers of the processes that may be alive on the machine of the first of them.

    They are numbers of that machine, whichever it is. What is no identity is left out.
    """
    found = [re.fullmatch(r"(.+):([1-9][0-9]{0,9}):[0-9]+", one, re.DOTALL) for one in identities]
    if not found or found[0] is None:
        return []
    machine = found[0][1]
    there = [one for one in found if one is not None and one[1] == machine and not is_dead(one[0])]
    return sorted({int(one[2]) for one in there} - {1})


def is_dead(identity: str) -> bool:
    """Return whether a process is known to be dead; False when this machine cannot tell."""
    try:
        machine, pid, start = identity.rsplit(":", 2)
        if machine != _machine():
            return False
        os.kill(int(pid), 0)
        state, started = _state(int(pid))
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # hidden from this user, or `identity` is malformed
        return False
    return state in "ZX" or started != start


def _machine() -> str:
    """Return the boot and the process namespace in which a process number is unique."""
    # Machines often share a host name, and the first namespace has the same number everywhere.
    boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{(_PROC / 'self/ns/pid').stat().st_ino}"


def _state(pid: int) -> tuple[str, str]:
    """Return a process's state letter and its start in clock ticks since the boot.

    Raises OSError when there is no such process.
    """
    # A name that was cut to 15 bytes may end inside of a letter.
    text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]  # fields 3 and 22: the name before them may hold spaces


@functools.cache
def _this_process() -> str:
    return uuid.uuid4().hex
