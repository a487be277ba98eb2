"""Start training jobs with torchrun, as users do, and watch and kill their processes."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.helpers.places import ROOT

QUICKSTART = str(ROOT / "recipes" / "quickstart.py")
LOOPBACK = "127.0.0.1"
SECONDS = 120.0  # Anything that a test waits for may take this long.


def small(data: str, run: str, *more: str) -> list[str]:
    """Return the arguments of a run of a small network on the data of tiny.py.

    The run logs every step.
    """
    return [
        *(QUICKSTART, "--data.train", f"{data}/train", "--data.val", f"{data}/val"),
        *("--run-url", run, "--batch.size", "16", "--data.streams", "4", "--threads", "1"),
        *("--model.encoder.width", "0.125", "--model.hidden", "32", "--model.projection", "16"),
        *("--schedule.epochs", "1000", "--schedule.warmup", "1 epoch", "--log.every", "1"),
        *("--probe.no-baseline", "--probe.every", "0", "--precision", "fp32", *more),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Agent:
    """A simulated machine: torchrun with its workers, in a session of its own."""

    def __init__(
        self,
        arguments: list[str],
        output: Path,
        *,
        processes: int,
        nodes: str = "1",
        port: int = 0,
        host: bool = True,
        restarts: int = 1000,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        address: str = LOOPBACK,
        meet: str = LOOPBACK,
    ) -> None:
        """Start torchrun.

        Args:
            output: File that the log is appended to.
            port: Port of the rendezvous that all machines of a job share; 0 takes a free one.
            host: Whether this machine hosts the rendezvous.
            prefix: Command that starts torchrun, such as one that enters a namespace.
            address: Address of this machine.
            meet: Address of the rendezvous.
        """
        self.output = output
        # All agents are on one real machine, so each would take itself for the host.
        conf = ["last_call_timeout=2", "keep_alive_interval=1", f"is_host={host}"]
        launcher = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"),
            *(f"--nnodes={nodes}", f"--max-restarts={restarts}", "--monitor-interval=0.1"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={meet}:{port or free_port()}"),
            *("--rdzv-id=job", f"--rdzv-conf={','.join(conf)}"),
            f"--local-addr={address}",
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            str(ROOT / "launch" / "train.py"),
        ]
        self._mark = f"TESTED_JOB={uuid.uuid4().hex}"  # All its processes inherit this variable.
        own = dict([self._mark.split("=")])
        own["OMP_NUM_THREADS"] = "1"
        if nodes != "1":
            own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with output.open("ab") as stream:
            self.process = subprocess.Popen(
                [*prefix, *launcher, *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | own | dict(environment or {}),
                start_new_session=True,
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def steps(self) -> list[int]:
        """Return the steps that the log mentions, in the order of their lines."""
        return [int(n) for n in re.findall(r"^step (\d+) ", self.text(), re.MULTILINE)]

    def step(self) -> int:
        """Return the last step in the log, or 0 when there is none yet."""
        return [0, *self.steps()][-1]

    def workers(self) -> list[int]:
        """Return the process ids of the live workers."""
        return [pid for pid in children(self.process.pid) if "train.py" in command(pid)]

    def loaders(self) -> list[int]:
        """Return the process ids of the live processes that load images for the workers."""
        return [
            pid
            for worker in self.workers()
            for pid in children(worker)
            if "loader_child.py" in command(pid)
        ]

    def settings(self, name: str) -> dict[int, int]:
        """Return the value of a numeric environment variable for each live worker.

        Workers without the variable are left out.
        """
        found = {
            pid: dict(e.split(b"=", 1) for e in environment_of(pid) if b"=" in e)
            for pid in self.workers()
        }
        return {pid: int(own[name.encode()]) for pid, own in found.items() if name.encode() in own}

    def attempts(self) -> dict[int, int]:
        """Return, for each live worker, how often torchrun had started the workers before."""
        return self.settings("TORCHELASTIC_RESTART_COUNT")

    def wait(self, seconds: float = SECONDS) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        """Kill agent and workers at once, as if the machine had failed."""
        for pid in [*self.workers(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def left(self) -> list[int]:
        """Return the ids of this machine's processes that are still there."""
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in found if self._mark.encode() in environment_of(pid)]


@contextlib.contextmanager
def ended(*agents: Agent) -> Iterator[None]:
    """Kill the agents and all their processes when the block ends."""
    try:
        yield
    finally:
        for agent in agents:
            agent.kill()
            for pid in agent.left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], object], seconds: float = SECONDS, every: float = 0.02) -> None:
    """Wait until a condition is true. Fail when it is not true after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(every)


def children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def environment_of(pid: int) -> list[bytes]:
    """Return the environment of a process, as NAME=VALUE entries.

    The list is empty, or holds only an empty entry, for a zombie, a process that is gone, and a
    process of another user.
    """
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
