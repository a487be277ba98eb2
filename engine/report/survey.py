"""Look at all runs below a URL: which there are, how far they are, and whether they are alive."""

import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.log import journal
from engine.report.facts import RunFacts, read_recipe
from engine.report.states import tell_state
from engine.state import checkpoint, layout, origin
from shards.errors import InputError
from shards.storage import files
from shards.storage.entries import Entry, list_entries
from shards.threads import run_in_threads

MOST_FOLDERS = 10_000  # that are listed in the search for runs
TAIL = 1 << 20  # bytes at the end of a long log that are read for its newest figures
THREADS = 16  # folders and runs that are read at once
FIGURES = ("loss", "knn_top1", "online_top1", "feature_std", "feature_rank", "health")
_SIGNS = {layout.JSONL, layout.CHECKPOINTS, layout.LEASE}  # of a run without a recipe


@dataclass
class RunSummary:
    """What the table of runs shows of one run."""

    url: str
    fields: dict[str, Any] = field(default_factory=dict)  # the recipe, by dotted names
    step: int | None = None
    total_steps: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)  # the newest of FIGURES
    steps: dict[str, int] = field(default_factory=dict)  # of the figures
    stopped_early: bool = False  # a figure of the log ended the training at the newest step
    state: str = ""  # in words
    age: float | None = None  # seconds since the log was last written to
    faults: list[str] = field(default_factory=list)  # what could not be read, and why


@dataclass
class Survey:
    """All runs below a URL, and what was left out of the search."""

    runs: list[RunSummary]
    notes: list[str]


def survey_runs(url: str, depth: int) -> Survey:
    """Find the runs below a URL, and read their recipes, leases and newest figures.

    Nothing is written. Folders are listed one by one, and what is in a checkpoint never.

    Args:
        depth: Number of levels of folders below the URL that are searched.

    Raises InputError when there is no run, and OSError when the URL cannot be listed.
    """
    files.check(url, "URL")
    if not url.strip():
        raise InputError("URL is empty: give the folder that your runs lie in")
    notes: list[str] = []
    found = list(_find(url.rstrip("/") or url, depth, notes))
    runs = run_in_threads(lambda place: _summarize(*place), found, THREADS)
    if not runs:
        more = "".join(f"; {note}" for note in notes)
        raise InputError(
            f"URL {files.redact(url)}: there is no run within {depth} levels of folders{more}: "
            "give the folder that your runs lie in, or a larger --depth"
        )
    return Survey(sorted(runs, key=lambda run: run.url), notes)


def _find(url: str, depth: int, notes: list[str]) -> Iterator[tuple[str, list[Entry]]]:
    """Yield the URL of each run, and what lies in it, level by level.

    A run may lie in another run's folder, beside the other's own files.
    """
    level, looked = [url], 0
    for below in range(depth + 1):
        if looked + len(level) > MOST_FOLDERS:
            notes.append(f"{looked + len(level) - MOST_FOLDERS} folders or more were not searched")
            level = level[: MOST_FOLDERS - looked]
        looked += len(level)
        following = []
        for place, entries in zip(level, run_in_threads(_list, level, THREADS), strict=True):
            if isinstance(entries, OSError):
                if place == url:
                    raise entries
                notes.append(f"{files.redact(place)} cannot be listed ({entries})")
                continue
            names = {entry.name for entry in entries}
            # The folder of an evaluation's result has a lease too.
            is_run = layout.RECIPE in names or (names & _SIGNS and layout.RESULT not in names)
            if is_run:
                yield place, entries
            own = layout.NAMES if is_run else ()
            folders = [entry.name for entry in entries if entry.is_folder]
            following += [files.join(place, name) for name in folders if name not in own]
        level = following if below < depth else []


def _list(url: str) -> list[Entry] | OSError:
    try:
        return list_entries(url)
    except OSError as error:
        return error


def _summarize(url: str, entries: list[Entry]) -> RunSummary:
    """Read what the table shows of a run. What cannot be read is a fault of the run."""
    run = RunSummary(url)
    there = {entry.name: entry for entry in entries}
    try:
        if layout.RECIPE in there:
            document = read_recipe(url)
            run.total_steps = RunFacts(url, document).total_steps
            run.fields = {k: v for k, v in document.items() if k not in origin.FACTS}
        elif not _is_empty(there):
            run.faults.append(f"{layout.RECIPE} is missing")
    except (OSError, ValueError) as error:
        run.faults.append(f"{layout.RECIPE} cannot be read: {error}")
    try:
        _read_log(run, there)
    except (OSError, ValueError) as error:
        run.faults.append(f"{layout.JSONL} cannot be read: {error}")
    try:
        _read_checkpoints(run, there)
    except OSError as error:
        run.faults.append(f"{layout.CHECKPOINTS} cannot be listed: {error}")
    try:
        done, empty = run.step is not None and run.step == run.total_steps, _is_empty(there)
        run.state = tell_state(run.url, done=done, stopped_early=run.stopped_early, empty=empty)
    except (OSError, InputError) as error:
        run.faults.append(f"{layout.LEASE} cannot be read: {error}")
    return run


def _read_log(run: RunSummary, there: dict[str, Entry]) -> None:
    """Take the newest figures from the end of the log, and from the whole of it if need be."""
    parts = list_entries(files.join(run.url, layout.PARTS)) if layout.PARTS in there else []
    log = there.get(layout.JSONL)
    times = [e.modified for e in [*parts, *([log] if log else [])] if e.modified is not None]
    run.age = max(0.0, time.time() - max(times)) if times else None
    is_long = log is not None and log.size > TAIL
    told: list[str] = []
    records = journal.read(run.url, TAIL if is_long else None, told.append)
    if is_long and run.fields.get("probe.every") and not any("knn_top1" in r for r in records):
        records = journal.read(run.url)
    if records:
        run.step = records[-1]["step"]
        run.stopped_early = bool(records[-1].get(journal.STOPPED_EARLY))
        run.faults += told
    elif log or parts:
        run.faults.append("the log has no line that can be read")
    for key in FIGURES:
        names = (key, _name_evaluated(run.fields)) if key == "knn_top1" else (key,)
        record = next((one for one in reversed(records) if one.keys() & set(names)), {})
        value = next((record[name] for name in names if record.get(name) is not None), None)
        if value is not None:
            run.figures[key], run.steps[key] = value, record["step"]
        elif key == "loss" and records and "loss" in records[-1]:
            run.figures[key] = math.nan


def _name_evaluated(fields: dict[str, Any]) -> str:
    """Return the name that launch/evaluate.py gives to the same kNN as the training's own."""
    k, temperature = fields.get("probe.neighbours"), fields.get("probe.temperature")
    known = isinstance(k, int) and isinstance(temperature, int | float)
    return f"knn_k{k}_t{temperature:g}_top1" if known else ""


def _read_checkpoints(run: RunSummary, there: Collection[str]) -> None:
    """Take the step of the newest checkpoint where it is beyond the log, whose lines are fewer."""
    if layout.CHECKPOINTS not in there:
        return
    for step in reversed(checkpoint.steps(run.url)):
        if step <= (run.step or 0):
            return
        if files.exists(files.join(checkpoint.step_url(run.url, step), checkpoint.COMMIT)):
            run.step = step
            return


def _is_empty(there: Collection[str]) -> bool:
    """Return whether a job claimed the folder for a run, and has written nothing of the run."""
    return not {layout.RECIPE, layout.JSONL, layout.PARTS, layout.CHECKPOINTS} & set(there)
