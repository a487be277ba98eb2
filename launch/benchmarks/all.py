"""Run all benchmarks one after the other, and gather their rows in one table."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.benchmarks.machine import ROOT
from launch.benchmarks.measuring import CUDA, require_positive
from launch.benchmarks.results import Report, Row, check_out, read_rows

TIMEOUT = 600.0  # seconds that one of the commands may take
GLOO = "torchrun --nproc-per-node 2 launch/bench.py"
ALONE = "python launch/bench.py"


def bench_all(*, rounds: int = 5, fast: bool = False, out: str = "") -> Report:
    """Run all benchmarks one after the other, and gather their rows in one table.

    Each row belongs to a command, which makes it alone. The commands run as processes of their
    own, with the rows going through files of JSON, so one that fails or hangs costs only its own
    rows. On a CPU every process has one thread, and the sizes are such that two cores take about
    twenty minutes.

    Args:
        rounds: Number of times that each side is measured.
        fast: Measure each side once and on very little, to see within minutes that all commands
            run. The figures mean nothing.
        out: File that the rows are also written to, as JSON.
    """
    check_out(out)
    require_positive(rounds=rounds)
    rows: list[Row] = []
    failed: list[dict[str, Any]] = []
    commands = list_commands(1 if fast else rounds, fast)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end the command, too
    try:
        for number, command in enumerate(commands, start=1):
            print(f"command {number} of {len(commands)}: {command}", file=sys.stderr, flush=True)
            found, failure = run_command(command)
            rows += found
            if failure:
                failed.append(failure)
    finally:
        signal.signal(signal.SIGTERM, before)
    title = [f"all: medians of {1 if fast else rounds} rounds"]
    return Report(title, rows, out, failed)


def list_commands(rounds: int, fast: bool) -> list[str]:
    """Return the command lines, whose defaults differ between a GPU and a CPU."""
    threads = "" if CUDA else " --threads 1"
    every = f"--rounds {rounds}{threads}"
    photos = "--images 10 --batch 5 --size 64" if fast else "--images 100 --batch 25"
    steps = "--steps 1 --batch 16" if fast else "--steps 20" if CUDA else "--steps 3"
    few = "--samples 100000 --shards 100 --batch 4096 --streams 512 --ranks 64 --walk 50"
    many = "--samples 100000000 --shards 10000"
    precisions = ("bf16",) if fast or CUDA else ("fp32", "bf16")
    commands = [f"{ALONE} input {photos} {every}"]
    commands += [f"{ALONE} step --precision {kind} {steps} {every}" for kind in precisions]
    if not CUDA:
        commands.append(f"{GLOO} step --precision fp32 {steps} {every}")
    small = "--size 32 --batch 4 --steps 1" if fast else "--size 32 --batch 64 --steps 3"
    large = "--depth 50 --size 112 --batch 32 --steps 2"
    sizes = [""] if CUDA else [small] if fast else [small, large]
    commands += [f"{ALONE} peers {size} {every}".replace("  ", " ") for size in sizes]
    if not CUDA and not fast:
        commands.append(f"{ALONE} peers {large} {every} --precision bf16")
        tiny = f"{ALONE} peers --recipe recipes/cifar10_cpu.py --steps 10 {every}"
        commands += [f"{tiny} --precision {kind}" for kind in precisions]
    saved = " --recipe recipes/quickstart.py" if fast else ""
    commands += [
        f"{ALONE} checkpoint --rounds {rounds} --starts {0 if fast else rounds}{saved}",
        f"{ALONE} order {few if fast else many} --rounds {rounds}",
        f"{ALONE} plan --processes 64 --strategies {'ddp' if fast else 'ddp fsdp'}",
    ]
    return commands


def run_command(command: str) -> tuple[list[Row], dict[str, Any] | None]:
    """Run one command line, and return its rows, or what is known of its failure."""
    program, *rest = command.split()
    launcher = [sys.executable]
    if program == "torchrun":
        launcher += ["-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        reason = _run([*launcher, *rest, "--out", str(path)])
        if reason:
            return [], {"command": command, "reason": reason}
        rows = read_rows(json.loads(path.read_text()))
    return [replace(row, command=command) for row in rows], None


def _run(command: list[str]) -> str:
    """Run a command to its end, and return why it failed, or ""."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the processes that it started, too
            return f"it took more than {TIMEOUT:g} seconds"
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode:
        lines = errors.strip().splitlines() or ["it printed nothing"]
        said = [line for line in lines if line.startswith("error:")] or lines
        return f"exit status {process.returncode}: {said[-1]}"
    return ""


def _environment() -> dict[str, str]:
    """Return the environment in which the commands find this project, on one thread on a CPU."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    threads = {} if CUDA else {"OMP_NUM_THREADS": "1"}
    return os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths)}
