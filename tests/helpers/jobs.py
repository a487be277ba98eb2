"""Training jobs as users start them: torchrun's agents as processes, to be watched and killed."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.helpers.places import ROOT

QUICKSTART = str(ROOT / "recipes" / "quickstart.py")
SECONDS = 120.0  # that anything expected may take


def small(data: str, run: str, *more: str) -> list[str]:
    """Arguments of a run on the data of tiny.py: a small network, every step logged."""
    return [
        *(QUICKSTART, "--data.train", f"{data}/train", "--data.val", f"{data}/val"),
        *("--run-url", run, "--batch.size", "16", "--data.streams", "4", "--threads", "1"),
        *("--model.encoder.width", "0.125", "--model.hidden", "32", "--model.projection", "16"),
        *("--schedule.epochs", "1000", "--schedule.warmup-epochs", "1", "--log.every", "1"),
        *("--probe.no-baseline", "--probe.every", "0", "--precision", "fp32", *more),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Agent:
    """A machine: torchrun with its workers, in a process group of its own."""

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
    ) -> None:
        """`port`: of the meeting point that all machines of a job share, which is at the `host`.

        `output` is appended to.
        """
        self.output = output
        # On one machine each would take itself for the host.
        conf = ["last_call_timeout=2", "keep_alive_interval=1", f"is_host={host}"]
        launcher = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"),
            *(f"--nnodes={nodes}", f"--max-restarts={restarts}", "--monitor-interval=0.1"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port or free_port()}"),
            *("--rdzv-id=job", f"--rdzv-conf={','.join(conf)}"),
            "--local-addr=127.0.0.1",
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            str(ROOT / "launch" / "train.py"),
        ]
        self._mark = f"TESTED_JOB={uuid.uuid4().hex}"  # in the environment of all its processes
        own = dict([self._mark.split("=")])
        own["OMP_NUM_THREADS"] = "1"
        if nodes != "1":
            own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with output.open("ab") as stream:
            self.process = subprocess.Popen(
                [*launcher, *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | own | dict(environment or {}),
                start_new_session=True,
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def steps(self) -> list[int]:
        """The steps that the log tells of, in the order of their lines."""
        return [int(n) for n in re.findall(r"^step (\d+) ", self.text(), re.MULTILINE)]

    def step(self) -> int:
        """The last of them; 0 before."""
        return [0, *self.steps()][-1]

    def workers(self) -> list[int]:
        """Process numbers of the workers that live."""
        return [pid for pid in children(self.process.pid) if "train.py" in command(pid)]

    def settings(self, name: str) -> dict[int, int]:
        """A number that torchrun gave to its workers in the environment, by those that live."""
        found = {
            pid: dict(e.split(b"=", 1) for e in environment_of(pid) if b"=" in e)
            for pid in self.workers()
        }
        return {pid: int(own[name.encode()]) for pid, own in found.items() if name.encode() in own}

    def attempts(self) -> dict[int, int]:
        """The workers that live, and how often torchrun had started them before."""
        return self.settings("TORCHELASTIC_RESTART_COUNT")

    def wait(self, seconds: float = SECONDS) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        """The machine is gone: agent and workers, at once."""
        for pid in [*self.workers(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def left(self) -> list[int]:
        """Processes of this machine that are still there."""
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in found if self._mark.encode() in environment_of(pid)]


@contextlib.contextmanager
def ended(*agents: Agent) -> Iterator[None]:
    """Nothing of them stays behind."""
    try:
        yield
    finally:
        for agent in agents:
            agent.kill()
            for pid in agent.left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], object], seconds: float = SECONDS, every: float = 0.02) -> None:
    """Wait; fails when the time is over."""
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
    """Of a process of this user that lives; a zombie's is empty."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
