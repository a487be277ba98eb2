"""Make sure that all processes of a job write to the same run directory.

Machines may name it by other paths, so paths tell nothing. Where each machine has a disk of its
own, every checkpoint would be spread over the disks, and no start could read one.
"""

import socket
import time

from engine.processes.world import World
from engine.state import lease
from engine.state.lease import Lease
from shards.errors import InputError
from shards.storage import files

# A network disk may know for up to a minute that a file was not there, before it looks again.
PATIENCE = 90.0  # seconds
POLL = 0.5  # seconds


def check_same_folder(run: str, held: Lease | None, world: World) -> None:
    """Raise InputError on all processes unless each of them finds the lease of this job in `run`.

    All processes call it together.

    Args:
        run: URL of the run directory, which may differ between machines.
        held: The lease, on the first process.
    """
    if world.size == 1:
        return
    number, owner, host = world.on_main(lambda: held.sign if held else (0, "", ""))

    def look() -> None:
        end = time.monotonic() + PATIENCE
        while owner and not lease.holds_number(run, number, owner):
            if time.monotonic() > end:
                raise InputError(
                    f"run {files.redact(run)}: rank {world.rank} on {socket.gethostname()} does "
                    f"not find there what rank 0 on {host} has written to its run: {_remedy(run)}"
                )
            time.sleep(POLL)

    world.on_all(look)


def _remedy(run: str) -> str:
    if files.is_local(run):
        return "give a --run-url that is the same folder for all machines, such as one of a bucket"
    return (
        "give all machines the same --run-url, and the same store (AWS_ENDPOINT_URL, for instance)"
    )
