"""Measure how long training waits for a checkpoint, and how long a start takes."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from engine.processes.world import World
from engine.recipe import load
from engine.state import checkpoint
from engine.state.saver import Saver
from engine.trainer import Trainer
from launch.benchmarks.machine import ROOT
from launch.benchmarks.measuring import alternate, device_name, require_positive, wait
from launch.benchmarks.results import Report, Row, check_out, compare
from launch.benchmarks.step import prepare
from shards.making import synthetic
from shards.storage import files

FOLDER = "bench_checkpoint"  # folder under --url, removed at the end
IMPORTS = "import torch, torchvision, torch.distributed.checkpoint.state_dict"


class Times(NamedTuple):
    """Times of one save, in seconds."""

    stall: float  # until training can continue
    total: float  # until the whole checkpoint is in storage


def bench_checkpoint(
    *,
    url: str = "",
    recipe: str = "cifar10",
    rounds: int = 3,
    starts: int = 3,
    out: str = "",
) -> Report:
    """Measure how long training waits for a checkpoint, and how long a start takes.

    Ours saves once in the background and once while training waits. Stock, the usual way, is
    torch.save to a local file, which fsspec then uploads. After that a training of the quickstart's
    networks resumes from a checkpoint. The time from the process's start to its first step is
    measured beside the imports that any training would need.

    Args:
        url: Folder in an object store, measured beside a local disk. A folder in it is written and
            removed again.
        recipe: Recipe file whose networks and optimizer are saved.
        rounds: Number of times that each way of saving is measured.
        starts: Number of times that a start is measured. 0 leaves starts out.
        out: File that the rows are also written to, as JSON.
    """
    check_out(out)
    files.check(url, "--url")
    require_positive(rounds=rounds)
    base = load(recipe)
    base = replace(base, batch=replace(base.batch, size=8, micro=1), compile=False, threads=None)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        trainer, batch = prepare(base, folder)
        trainer.train_step(batch)  # after a step, the optimizer has state to save
        places = {"local disk": f"{folder}/saves"}
        if url:
            places[url.split("://")[0]] = files.join(url, FOLDER)
            stack.callback(files.discard, files.join(url, FOLDER), url, print)
        size = sum(t.numel() * t.element_size() for t in tree_leaves(trainer.state()))
        title = [f"checkpoint: {recipe}, {size / 2**20:,.0f} MiB, {device_name()}"]
        title.append(f"medians of {rounds} rounds and {starts} starts, in seconds")
        rows: list[Row] = []
        for place, where in places.items():
            rows += _measure_saves(place, where, trainer, rounds)
        for place, where in places.items() if starts else ():
            rows.append(_measure_starts(place, where, starts, folder))
        return Report(title, rows, out)


def _measure_saves(place: str, url: str, trainer: Trainer, rounds: int) -> list[Row]:
    sides: dict[str, Callable[[], Times]] = {}
    with contextlib.ExitStack() as stack:
        for name, background in (("in the background", True), ("waiting", False)):
            saver = stack.enter_context(Saver(trainer.world, background, print))
            sides[name] = partial(_ours, trainer, saver, url)
        sides["stock"] = partial(_stock, trainer, files.join(url, "stock.pt"))
        for side in sides.values():  # a first save makes buffers and connections
            side()
        times = alternate(sides, rounds)
    columns = {name: list(zip(*found, strict=True)) for name, found in times.items()}
    rows = []
    for name in ("in the background", "waiting"):
        for what, ours, stock in zip(
            ("training waits", "all is there"), columns[name], columns["stock"], strict=True
        ):
            label = f"checkpoint to {place}, {name}: {what}"
            rows.append(compare(label, list(ours), list(stock), "s", "torch.save"))
    return rows


def _ours(trainer: Trainer, saver: Saver, url: str) -> Times:
    def write(state: dict[str, Any], world: World) -> None:
        checkpoint.save(url, 1, state, {}, "", world)

    start = time.perf_counter()
    saver.save(1, trainer.state(), write)
    stall = time.perf_counter() - start
    saver.finish()
    return Times(stall, time.perf_counter() - start)


def _stock(trainer: Trainer, url: str) -> Times:
    start = time.perf_counter()
    filesystem, path = files.open_filesystem(url)
    with TemporaryDirectory() as folder:
        torch.save(trainer.state(), f"{folder}/state.pt")
        filesystem.put_file(f"{folder}/state.pt", path)
    wait()
    seconds = time.perf_counter() - start
    return Times(seconds, seconds)


def _measure_starts(place: str, url: str, starts: int, folder: str) -> Row:
    data = f"{folder}/start"
    if not files.exists(f"{data}/train/index.json"):
        synthetic.write(f"{data}/train", 1024, 32, seed=0)
        synthetic.write(f"{data}/val", 64, 32, seed=1)
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "recipes/quickstart.py"]
    command += ["--data.train", f"{data}/train", "--data.val", f"{data}/val"]
    command += ["--run", files.join(url, "run"), "--probe.every", "0", "--probe.no-baseline"]
    command += ["--log.every", "1", "--steps"]
    _until_first_step([*command, "1"])
    seconds, imports = [], []
    for number in range(starts):
        seconds.append(_until_first_step([*command, str(number + 2)]))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True)
        imports.append(time.perf_counter() - start)
    row = compare(f"resumed from {place}, start to first step", seconds, imports, "s", "imports")
    return replace(row, note="imports are those of torch and torchvision alone")


def _until_first_step(command: list[str]) -> float:
    """Run a training to its end, and return the seconds from its start to its first step.

    Raises OSError when the training fails.
    """
    start, seconds = time.perf_counter(), None
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if seconds is None and re.match(r"step \d+ ", line):
                seconds = time.perf_counter() - start
    if process.returncode or seconds is None:
        raise OSError(f"the measured start failed: {' '.join(command)}")
    return seconds
