"""Benchmarks give typed rows, which bench.py all gathers."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import bench
from launch.benchmarks import peers
from launch.benchmarks.all import list_commands
from launch.benchmarks.machine import read_head
from launch.benchmarks.measuring import Cost
from launch.benchmarks.results import (
    Ratio,
    Report,
    Row,
    compare,
    find_command,
    publish,
    read_rows,
    speeds,
)


def count(lines: list[str], start: str) -> int:
    return sum(line.startswith(start) for line in lines)


STUB = """
import shutil, sys, time
if sys.argv[1] == "hang":
    time.sleep(600)
if sys.argv[1] == "fail":
    sys.exit("some line\\nerror: no such recipe file\\nanother")
shutil.copy(sys.argv[1], sys.argv[sys.argv.index("--out") + 1])
"""


def test_all_gathers_rows_and_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that hangs or fails costs only its own rows."""
    made = [compare("it", [1.0, 2.0, 4.0], [4.0, 3.0, 2.0], "s"), Row("alone", 1.5, "s", limit=3)]
    publish(Report(["title"], made, str(tmp_path / "made.json")), read_head(), ["order"])
    stub, out = tmp_path / "stub.py", tmp_path / "rows.json"
    stub.write_text(STUB)
    commands = [f"python {stub} {what}" for what in ("hang", tmp_path / "made.json", "fail")]
    monkeypatch.setattr("launch.benchmarks.all.list_commands", lambda *_: commands)
    monkeypatch.setattr("launch.benchmarks.all.TIMEOUT", 5.0)

    capsys.readouterr()
    assert bench.main(["all", "--out", str(out)]) == 1

    lines = capsys.readouterr().out.splitlines()
    document = json.loads(out.read_text())
    assert read_rows(document) == [replace(row, command=commands[1]) for row in made]
    assert [count(lines, name) for name in ("it", "alone", "failed: ")] == [1, 1, 2]
    assert document["rows"][1]["share"] == 0.5
    assert document["failed"] == [
        {"command": commands[0], "reason": "it took more than 5 seconds"},
        {"command": commands[2], "reason": "exit status 1: error: no such recipe file"},
    ]
    assert document["machine"]["cores"] >= 1
    assert torch.__version__.startswith(document["versions"]["torch"])
    assert {"date", "load"} <= document.keys()


@pytest.mark.parametrize("fast", [False, True])
def test_commands_of_all_are_understood(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bench is named, and takes the options that it is given."""
    given = []
    for name, function in bench.BENCHES.items():

        @functools.wraps(function)
        def noted(name: str = name, **options: Any) -> None:
            given.append((name, options))

        monkeypatch.setitem(bench.BENCHES, name, noted)
    commands = list_commands(3, fast)
    for command in commands:
        assert bench.main(command.partition("launch/bench.py ")[2].split()) == 0
    assert [name for name, _ in given] == [c.partition("bench.py ")[2].split()[0] for c in commands]
    assert {"input", "step", "checkpoint", "peers", "order", "plan"} == {name for name, _ in given}
    assert all(options.get("rounds", 3) == 3 for _, options in given)


def test_ratios_are_of_medians_and_of_single_rounds() -> None:
    row = compare("it", [1.0, 2.0, 4.0], [4.0, 3.0, 2.0], "s")
    assert (row.ours, row.other, row.ratio) == (2.0, 3.0, Ratio(1.5, 0.5, 4.0))
    whole, _ = speeds("it", [Cost(0.5, 1.0, 0)], [Cost(1.0, 1.0, 0)], limit=4.0)
    assert (whole.ours, whole.other, whole.ratio) == (2.0, 1.0, Ratio(2.0, 2.0, 2.0))
    assert whole.share == 0.5


def test_the_command_is_the_one_without_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["step", "--out", "a b.json", "--steps", "1", "--out=c.json"]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_command(arguments) == "python launch/bench.py step --steps 1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    started = "torchrun --nproc-per-node 2 launch/bench.py step --steps 1"
    assert find_command(arguments) == started


@pytest.mark.parametrize("peer", ["lightly", "kornia"])
def test_a_peer_that_is_not_there_has_a_row(peer: str) -> None:
    cost = [Cost(0.5, 0.5, 0)]
    costs = {"ours": cost, "training": cost, "augmentation": cost}
    costs |= {side: cost for name, sides in peers.ROWS.items() if name != peer for side in sides}
    for row in peers._rows(costs, {peer: f"{peer} is not installed"}):
        if row.name.endswith(peer):
            assert (row.other, row.note) == (None, f"{peer} is not installed")
        else:
            assert row.other == 2.0
