"""The commands of launch/evaluate.py that only read what runs have written: report and runs."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from annotated_types import Interval
from rich.table import Table

from engine.log.health import ADVICE, HEALTHY
from engine.log.terminal import Terminal
from engine.log.time_spans import show_span
from engine.processes.launcher import rank
from engine.recipe import operation_names
from engine.report.curves import show_number
from engine.report.page import name_runs
from engine.report.recipes import differing_fields
from engine.report.report import write_report
from engine.report.survey import RunSummary, survey_runs
from shards.errors import printable
from shards.storage import files

_WIDE = 10_000  # columns of a table that is written to no terminal, which must not be cut
_LONGEST = 60  # characters of a field's value
_LONGEST_HEALTH = 20
_FIGURES = {"loss": "loss", "knn_top1": "kNN", "online_top1": "head", "feature_std": "std"}


@dataclass(frozen=True)
class Report:
    """Write RUN/report.html, which shows a whole run in a browser, without network."""

    run_url: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """URL of the run, which may still be training."""
    compare: tuple[str, ...] = ()
    """URLs of other runs, at most 7. Their curves are drawn over the run's, and their recipes and
    figures are compared with its own."""
    out: str = ""
    """URL of the file to write. By default it is RUN/report.html."""

    def run(self) -> None:
        if rank() == 0:
            url = write_report(self.run_url, self.compare, self.out)
            Terminal(True).say(f"report  {files.redact(url)}")


@dataclass(frozen=True)
class Runs:
    """List the runs below a URL: how far they are, whether they are alive, how they differ."""

    url: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URL")]
    """URL of a folder that runs lie in."""
    depth: Annotated[int, Interval(ge=0, le=8)] = 3
    """Number of levels of folders below the URL that are searched."""
    all_fields: bool = False
    """List all fields that differ, also those that do not change the method, such as threads."""

    def run(self) -> None:
        if rank() == 0:
            show_runs(self.url, self.depth, self.all_fields)


def show_runs(url: str, depth: int, all_fields: bool = False) -> None:
    """Print a table of the runs below a URL, how they differ, and what could not be read of them.

    Args:
        all_fields: Whether fields are listed that do not change the method, too.
    """
    survey, terminal = survey_runs(url, depth), Terminal(True)
    names = [printable(name) for name in _name_below(url, survey.runs)]
    _print_table(terminal, _make_table(survey.runs, names))
    for line in _list_differences(survey.runs, names, all_fields):
        terminal.say(line)
    for run, name in zip(survey.runs, names, strict=True):
        for fault in run.faults:
            terminal.say(f"{name}: {fault}")
        if (health := run.figures.get("health")) not in (None, "", HEALTHY):
            meaning = f": {ADVICE[health].meaning}" if health in ADVICE else ""
            terminal.say(f"{name}: health: {health}{meaning}")
    for note in survey.notes:
        terminal.say(note)


def _make_table(runs: list[RunSummary], names: list[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("run", "step", "state", "health", "last line"):
        table.add_column(title, justify="right" if title == "step" else "left")
    shown = [key for key in _FIGURES if any(key in run.figures for run in runs)]
    for key in shown:
        table.add_column(_FIGURES[key], justify="right")
    for run, name in zip(runs, names, strict=True):
        figures = [_show_figure(key, run.figures.get(key)) + _show_place(run, key) for key in shown]
        health = _cut(str(run.figures.get("health") or "-"), _LONGEST_HEALTH)
        age = "" if run.age is None else f"{show_span(run.age)} ago"
        cells = (_show_step(run), run.state, health, age, *figures)
        table.add_row(name, *map(printable, cells))
    return table


def _print_table(terminal: Terminal, table: Table) -> None:
    """Print a table. In a file it is as wide as it has to be, and no line ends with blanks."""
    console = terminal.console
    console.soft_wrap = False
    if console.is_terminal:
        console.print(table)
        return
    console.width = _WIDE
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _list_differences(runs: list[RunSummary], names: list[str], all_fields: bool) -> list[str]:
    """Return a line for each run with its values of the fields that are not the same in all runs.

    The fields of the method come first. The others only come, or are only named, after them.
    """
    differing, free = differing_fields([run.fields for run in runs]), set(operation_names())
    others = [key for key in differing if key in free]
    keys = [key for key in differing if key not in free] + others * all_fields
    lines = []
    for i, name in enumerate(names):
        if values := [f"{key}={_cut(differing[key][i])}" for key in keys if differing[key][i]]:
            lines.append(f"{name}: {' '.join(values)}")
    if others and not all_fields:
        lines.append(
            f"--all-fields also lists what differs outside of the method: {len(others)} "
            f"field{'s' * (len(others) > 1)}"
        )
    return lines


def _name_below(url: str, runs: list[RunSummary]) -> list[str]:
    """Name the runs by their places below the URL."""
    home = f"{url.rstrip('/')}/"
    return [
        files.redact(run.url.removeprefix(home)) if run.url.startswith(home) else name
        for run, name in zip(runs, name_runs([run.url for run in runs]), strict=True)
    ]


def _show_step(run: RunSummary) -> str:
    step = "-" if run.step is None else f"{run.step:,}"
    return step if run.total_steps is None else f"{step} of {run.total_steps:,}"


def _show_figure(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-"
    return show_number(key, value if abs(value) < 1e99 else math.inf)


def _show_place(run: RunSummary, key: str) -> str:
    """Return the step of an evaluation's figure, where it is not that of the run."""
    step = run.steps.get(key)
    evaluated = key in ("knn_top1", "online_top1")
    return f" at {step:,}" if evaluated and step not in (None, run.step) else ""


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."
