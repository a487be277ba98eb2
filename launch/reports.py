"""The commands of launch/evaluate.py that only read what runs have written: report and runs."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from annotated_types import Interval
from rich.table import Table

from engine.log.terminal import Terminal
from engine.processes import world
from engine.report.curves import show_number
from engine.report.facts import HEALTHY
from engine.report.page import name_runs
from engine.report.recipes import differing_fields
from engine.report.report import write_report
from engine.report.survey import RunSummary, show_duration, survey_runs
from shards.errors import printable
from shards.storage import files

_WIDE = 10_000  # columns of a table that is written to no terminal, which must not be cut
_LONGEST = 60  # characters of a field's value in the table
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
        if world.rank() == 0:
            url = write_report(self.run_url, self.compare, self.out)
            Terminal(True).say(f"report  {files.redact(url)}")


@dataclass(frozen=True)
class Runs:
    """List the runs below a URL: how far they are, whether they are alive, how they differ."""

    url: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URL")]
    """URL of a folder that runs lie in."""
    depth: Annotated[int, Interval(ge=0, le=8)] = 3
    """Number of levels of folders below the URL that are searched."""

    def run(self) -> None:
        if world.rank() == 0:
            show_runs(self.url, self.depth)


def show_runs(url: str, depth: int) -> None:
    """Print a table of the runs below a URL, and what could not be read of them."""
    survey, terminal = survey_runs(url, depth), Terminal(True)
    terminal.console.soft_wrap = False
    if not terminal.console.is_terminal:
        terminal.console.width = _WIDE
    table = Table(box=None, pad_edge=False)
    for title in ("run", "step", "state", "last line"):
        table.add_column(title, justify="right" if title == "step" else "left")
    shown = [key for key in _FIGURES if any(key in run.figures for run in survey.runs)]
    for key in shown:
        table.add_column(_FIGURES[key], justify="right")
    differing = differing_fields([run.fields for run in survey.runs])
    table.add_column("differs in")
    names = _name_below(url, survey.runs)
    for i, (run, name) in enumerate(zip(survey.runs, names, strict=True)):
        fields = [f"{key}={_cut(values[i])}" for key, values in differing.items() if values[i]]
        figures = [_show_figure(key, run.figures.get(key)) for key in shown]
        age = "" if run.age is None else f"{show_duration(run.age)} ago"
        cells = [name, _show_step(run), run.state, age, *figures, " ".join(fields)]
        table.add_row(*map(printable, cells))
    terminal.console.print(table)
    for run, name in zip(survey.runs, names, strict=True):
        for fault in run.faults:
            terminal.say(f"{name}: {fault}")
        if (health := run.figures.get("health")) not in (None, "", HEALTHY):
            terminal.say(f"{name}: health: {health}")
    for note in survey.notes:
        terminal.say(note)


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


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
