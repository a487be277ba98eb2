"""Hold what the benchmarks find as typed rows, for the terminal and for a file of JSON."""

import json
import os
import shlex
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from engine.processes.launcher import rank
from launch.benchmarks.machine import Head
from launch.benchmarks.measuring import Cost
from shards.errors import InputError
from shards.storage import files


@dataclass(frozen=True)
class Ratio:
    """The ratio of two medians, with the smallest and the largest ratio of a single round."""

    value: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x ({self.least:.2f} to {self.most:.2f})"


@dataclass(frozen=True)
class Row:
    """One figure, and what it is compared with."""

    name: str
    ours: float | None
    unit: str
    other: float | None = None
    beside: str = ""  # whose figure `other` is: "stock", or the name of a peer
    ratio: Ratio | None = None  # above 1 where ours needs less time or memory
    limit: float | None = None  # what the machine allows at most, in the same unit
    note: str = ""
    command: str = ""  # that makes this row alone

    @property
    def share(self) -> float | None:
        """The share of the limit that ours reaches."""
        return self.ours / self.limit if self.limit and self.ours is not None else None

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share}


@dataclass(frozen=True)
class Report:
    """The rows of a benchmark, and what they were measured with."""

    title: list[str]
    rows: list[Row]
    out: str = ""  # URL of a file of JSON, or "" for none
    failed: list[dict[str, Any]] = field(default_factory=list)

    def document(self, head: Head) -> dict[str, Any]:
        rows = [row.document() for row in self.rows]
        return {**asdict(head), "title": self.title, "rows": rows, "failed": self.failed}


def read_rows(document: dict[str, Any]) -> list[Row]:
    """Return the rows of a file that `publish` wrote."""
    rows = []
    for entry in document["rows"]:
        known = {name: value for name, value in entry.items() if name != "share"}
        if known["ratio"] is not None:
            known["ratio"] = Ratio(**known["ratio"])
        rows.append(Row(**known))
    return rows


def ratio(over: list[float], under: list[float]) -> Ratio:
    single = [a / b for a, b in zip(over, under, strict=True)]
    return Ratio(median(over) / median(under), min(single), max(single))


def compare(
    name: str, ours: list[float], other: list[float], unit: str, beside: str = "stock"
) -> Row:
    """Make a row of what is better when it is less, such as seconds."""
    return Row(name, median(ours), unit, median(other), beside, ratio(other, ours))


def speeds(
    name: str,
    ours: list[Cost],
    other: list[Cost] | None = None,
    beside: str = "stock",
    limit: float | None = None,
) -> list[Row]:
    """Make the rows of images per second and per core-second.

    `limit` is the largest number of images per second.
    """
    rows = []
    for unit, column in (("images/s", 0), ("images/core-s", 1)):
        own = [cost[column] for cost in ours]
        most = limit if unit == "images/s" else None
        row = Row(name, 1 / median(own), unit, limit=most)
        if other is not None:
            theirs = [cost[column] for cost in other]
            found = ratio(theirs, own)
            row = replace(row, other=1 / median(theirs), beside=beside, ratio=found)
        rows.append(row)
    return rows


def check_out(out: str) -> None:
    """Raise InputError, before anything is measured, when the file `out` cannot be written."""
    files.check(out, "--out")
    if not out or rank():
        return
    if out.endswith("/") or (files.is_local(out) and os.path.isdir(out)):
        raise InputError(f"--out {files.redact(out)}: is a folder: give the name of a file")
    probe = f"{out}.probe"
    try:
        files.write(probe, b"")
    except OSError as error:
        raise InputError(f"--out {files.redact(out)}: cannot be written: {error}") from None
    files.remove(probe)


def publish(report: Report, head: Head, arguments: list[str]) -> None:
    """Print the report, and write it to its file, if it has one."""
    print("\n".join(report.title))
    print_rows(report.rows)
    for failure in report.failed:
        print(f"failed: {failure['command']}: {failure['reason']}")
    if report.out:
        command = find_command(arguments)
        rows = [row if row.command else replace(row, command=command) for row in report.rows]
        content = json.dumps(replace(report, rows=rows).document(head), indent=1)
        files.write(report.out, f"{content}\n".encode())


def find_command(arguments: list[str]) -> str:
    """Return the command line that this process was started with, without --out."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--out" and not argument.startswith("--out="):
            kept.append(argument)
        skip = not skip and argument == "--out"
    processes = os.environ.get("WORLD_SIZE", "")
    launcher = f"torchrun --nproc-per-node {processes}" if processes else "python"
    return f"{launcher} launch/bench.py {shlex.join(kept)}"


def print_rows(rows: list[Row]) -> None:
    width = max([44, *(len(row.name) + 2 for row in rows)])
    print(f"{'':<{width}}{'ours':>10} {'unit':<15}{'beside':>22}{'ratio':>28}{'of limit':>16}")
    for row in rows:
        beside = "" if row.other is None else f"{row.beside} {figure(row.other)}"
        share = "" if row.share is None else f"{row.share:.0%} of {figure(row.limit)}"
        times = "" if row.ratio is None else str(row.ratio)
        cells = f"{figure(row.ours):>10} {row.unit:<15}{beside:>22}{times:>28}"
        print(f"{row.name:<{width}}{cells}{share:>16}  {row.note}".rstrip())


def figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
