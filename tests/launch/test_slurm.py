"""launch/slurm.sbatch, run for real by bash, with two agents on this machine in place of nodes.

What stands in for Slurm's commands does as they do: srun hands SIGUSR1 on to its tasks and kills
them on SIGTERM. No Slurm was asked whether the rest of the script suits it.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed.run import config_from_args, get_args_parser

from shards.loader import DataConfig
from tests.helpers.jobs import QUICKSTART, SECONDS, environment_of, small, until
from tests.helpers.places import ROOT
from tests.helpers.recipes import parse_recipe

pytestmark = pytest.mark.versions

SCRIPT = ROOT / "launch" / "slurm.sbatch"
NODES = 2

SRUN = """
import os, signal, subprocess, sys

command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
tasks = [
    subprocess.Popen(command, env=os.environ | {"SLURM_NODEID": str(n), "SLURM_PROCID": str(n)})
    for n in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]

def forward(number, _frame):
    for task in tasks:
        task.send_signal(signal.SIGKILL if number == signal.SIGTERM else number)

signal.signal(signal.SIGUSR1, forward)
signal.signal(signal.SIGTERM, forward)
statuses = [task.wait() for task in tasks]
sys.exit(max(128 - status if status < 0 else status for status in statuses))
"""

SCONTROL = """
import os, sys
from pathlib import Path

with Path(os.environ["FAKE_SLURM"], "asked").open("a") as asked:
    print(*sys.argv[1:], file=asked)
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost\\nlocalhost")
if sys.argv[1:3] == ["show", "job"]:
    print("   PreemptEligibleTime=2024-05-01T10:00:00 PreemptTime=" + os.environ["PREEMPT_TIME"])
"""


@dataclass
class Slurm:
    """A folder of commands, and what the script sees of a cluster."""

    folder: Path
    environment: dict[str, str]

    @property
    def requeued(self) -> int:
        """How often the script had the job requeued."""
        return self.asked().count(f"requeue {self.environment['SLURM_JOB_ID']}")

    def asked(self) -> list[str]:
        """What the script wanted from scontrol."""
        return (self.folder / "asked").read_text().splitlines()

    def command(self, name: str, code: str) -> None:
        """Put an executable in the script's way."""
        file = self.folder / name
        file.write_text(f"#!{sys.executable} -S\n{code}")
        file.chmod(0o755)

    @contextlib.contextmanager
    def batch(self, output: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """The script, as Slurm starts it; in the end nothing of it is left."""
        with output.open("wb") as stream:
            process = subprocess.Popen(
                ["bash", str(SCRIPT), *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def processes(self) -> list[int]:
        """Every process that the script has started, and what those have."""
        mark = f"FAKE_SLURM={self.folder}".encode()
        there = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in there if mark in environment_of(pid)]


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    own = {
        "FAKE_SLURM": str(folder),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PROCESSES": "1",
        "GRACE": "60",
        "SHUTDOWN": "90",
        "SLURM_JOB_ID": str(job_with_free_port()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": str(NODES),
        "PREEMPT_TIME": "None",
        "OMP_NUM_THREADS": "1",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }
    made = Slurm(folder, os.environ | own)
    made.command("srun", SRUN)
    made.command("scontrol", SCONTROL)
    return made


def job_with_free_port() -> int:
    """A job's number whose port, as the script computes it, is free here."""
    for job in range(os.getpid(), os.getpid() + 10_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", 20_000 + job % 10_000))
            return job
    raise AssertionError("no free port")


def steps(run: Path) -> list[int]:
    try:
        return [
            json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
    except (FileNotFoundError, ValueError):  # not yet, or half a line
        return []


@pytest.mark.timeout(6 * SECONDS)
def test_told_to_stop_saved_requeued_and_done(
    slurm: Slurm, tiny_data: DataConfig, tmp_path: Path
) -> None:
    run, first, second = tmp_path / "run", tmp_path / "first.log", tmp_path / "second.log"
    # Only a process's end saves.
    command = small(str(Path(tiny_data.train).parent), str(run), "--checkpoint.every", "0")
    with slurm.batch(first, *command) as batch:
        until(lambda: len(steps(run)) >= 6 or batch.poll() is not None, 2 * SECONDS)
        assert batch.poll() is None, first.read_text()
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(60) == 0, first.read_text()
        assert slurm.processes() == []
    last = steps(run)[-1]
    assert slurm.requeued == 1
    assert (run / "checkpoints" / f"step_{last:08d}" / "commit.json").exists()

    slurm.environment["SLURM_RESTART_COUNT"] = "1"
    with slurm.batch(second, *command, "--steps", str(last + 4)) as batch:
        assert batch.wait(2 * SECONDS) == 0, second.read_text()
        assert slurm.processes() == []
    assert f"resumed at step {last} " in second.read_text()
    assert slurm.requeued == 1
    assert steps(run) == list(range(1, last + 5))


# What ends a step -------------------------------------------------------------------------------

AGENT = """
import os, signal, sys, time
from pathlib import Path

def told(number, _frame):
    Path(os.environ["FAKE_SLURM"], "told").open("a").write(f"{number} ")
    time.sleep(0.3)
    sys.exit(1)  # as torchrun's agent does, whatever its workers did

signal.signal(signal.SIGUSR1, told)
Path(os.environ["FAKE_SLURM"], f"started{os.environ['SLURM_NODEID']}").touch()
time.sleep(float(os.environ.get("AGENT_SECONDS", 100)))
sys.exit(int(os.environ["AGENT_STATUS"]))
"""


@pytest.fixture
def agents(slurm: Slurm) -> Slurm:
    """A Slurm with agents that only wait."""
    slurm.command("agent", AGENT)
    slurm.environment["PYTHON"] = str(slurm.folder / "agent")
    return slurm


def agents_run(slurm: Slurm) -> bool:
    return all((slurm.folder / f"started{n}").exists() for n in range(NODES))


@pytest.mark.parametrize(("told", "times"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_a_signal_reaches_all_agents_and_is_waited_for(
    agents: Slurm, tmp_path: Path, told: signal.Signals, times: int
) -> None:
    """The time limit's signal requeues; SIGTERM, of scancel, does not, yet agents can save."""
    with agents.batch(tmp_path / "log", QUICKSTART) as batch:
        until(lambda: agents_run(agents))
        batch.send_signal(told)
        batch.send_signal(told)
        status = batch.wait(SECONDS)
        assert agents.processes() == []
    assert status == 1 - times
    received = (agents.folder / "told").read_text().split()
    assert set(received) == {str(signal.SIGUSR1.value)}
    assert len(received) >= NODES
    assert agents.requeued == times


@pytest.mark.parametrize(
    ("status", "changes", "times"),
    [
        ("0", {}, 0),  # done
        ("1", {}, 0),  # a mistake
        ("1", {"PREEMPT_TIME": "2024-05-01T11:00:00"}, 1),  # Slurm told the agents alone
        ("0", {"PREEMPT_TIME": "2024-05-01T11:00:00"}, 0),  # done all the same
        ("1", {"PREEMPT_TIME": "2024-05-01T11:00:00", "SLURM_RESTART_COUNT": "100"}, 0),
    ],
)
def test_what_is_requeued(
    agents: Slurm, tmp_path: Path, status: str, changes: dict[str, str], times: int
) -> None:
    agents.environment |= {"AGENT_SECONDS": "0", "AGENT_STATUS": status} | changes
    with agents.batch(tmp_path / "log", QUICKSTART) as batch:
        assert batch.wait(SECONDS) == (0 if times else int(status))
    assert agents.requeued == times


def test_without_a_recipe(slurm: Slurm, tmp_path: Path) -> None:
    with slurm.batch(tmp_path / "log", "--data.train", "x") as batch:
        assert batch.wait(SECONDS) == 2
    assert (tmp_path / "log").read_text().startswith("error: usage: sbatch")


# What torchrun, the recipe and Slurm are told ----------------------------------------------------


def command_of(slurm: Slurm, output: Path, *more: str) -> list[str]:
    """The command that the script gives to srun."""
    slurm.command("srun", "import sys, json; print(json.dumps(sys.argv[1:]))")
    with slurm.batch(output, *more) as batch:
        assert batch.wait(SECONDS) == 0
    found: list[str] = json.loads(output.read_text())
    return found[found.index(slurm.environment["PYTHON"]) :]


def test_torchrun_and_the_recipe_understand_their_arguments(slurm: Slurm, tmp_path: Path) -> None:
    for name in ("GRACE", "SHUTDOWN"):
        del slurm.environment[name]
    more = ("recipes/r50_4096.py", "--data.train", "a", "--data.val", "b", "--run-url", "a b")
    command = command_of(slurm, tmp_path / "log", *more)
    assert command[1:3] == ["-m", "torch.distributed.run"]
    known = get_args_parser().parse_args(command[3:])
    config, _, _ = config_from_args(known)
    job = slurm.environment["SLURM_JOB_ID"]
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (NODES, NODES, 1)
    assert config.rdzv_endpoint == f"localhost:{20_000 + int(job) % 10_000}"
    assert (config.rdzv_backend, config.run_id) == ("c10d", job)
    assert "SIGUSR1" in config.signals_to_handle.split(",")
    assert known.training_script == "launch/train.py"
    recipe = parse_recipe(known.training_script_args)
    assert recipe.run == "a b"

    text = SCRIPT.read_text()
    shutdown = int(re.findall(r"SHUTDOWN=\$\{SHUTDOWN:-(\d+)\}", text)[0])
    lead = int(re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)[0])
    assert recipe.checkpoint.grace < shutdown < lead
    # What the user gives comes after it, and wins.
    command = command_of(slurm, tmp_path / "log", *more, "--checkpoint.grace", "5")
    known = get_args_parser().parse_args(command[3:])
    assert parse_recipe(known.training_script_args).checkpoint.grace == 5


def test_agents_get_their_environment(slurm: Slurm, tmp_path: Path) -> None:
    names = ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    slurm.command("srun", f"import os; print(*map(os.environ.get, {names}))")
    with slurm.batch(tmp_path / "log", QUICKSTART) as batch:
        assert batch.wait(SECONDS) == 0
    assert (tmp_path / "log").read_text().split() == ["1", "90"]
