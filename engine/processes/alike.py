"""Find out before the first collective whether the processes of a job can work together."""

import socket
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from shards.digest import digest
from shards.errors import InputError

_ROOT = Path(__file__).parents[2]


def check_devices(store: Store, device: torch.device, size: int) -> None:
    """Raise InputError on all processes when some have a GPU and others have none.

    Those with a GPU would wait for the others in NCCL until the timeout. All processes call it
    together, before there is a process group.
    """
    store.add("processes with a GPU", int(device.type == "cuda"))
    if store.add("processes", 1) == size:  # the last one tells all
        store.set("GPUs", str(store.add("processes with a GPU", 0)))
    count = int(store.get("GPUs"))
    if 0 < count < size:
        own = "has one" if device.type == "cuda" else "has none"
        raise InputError(
            f"{count} of {size} processes have a GPU and the others do not (this one on "
            f"{socket.gethostname()} {own}): look for what differs with nvidia-smi and in "
            "CUDA_VISIBLE_DEVICES on each machine, or train on CPUs by CUDA_VISIBLE_DEVICES= on all"
        )


def describe_software() -> dict[str, Any]:
    """Return what all processes must have in common of this code and of torch."""
    sources = sorted(
        path for part in ("engine", "shards") for path in _ROOT.glob(f"{part}/**/*.py")
    )
    content = [path.relative_to(_ROOT).as_posix().encode() + path.read_bytes() for path in sources]
    release = torch.__version__.partition("+")[0]  # behind it stands which GPUs it is built for
    return {"code of this package": digest(b"\0".join(content)), "torch": release}
