"""Collect what a run has written about itself. All of it may be a stranger's, or be damaged."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from engine.log import journal
from engine.log.journal import STOPPED_EARLY, Record
from engine.report.states import tell_state
from engine.report.thinning import Values
from engine.report.views import find_views
from engine.state import checkpoint, layout, origin
from shards.documents import build, parse_json
from shards.errors import InputError
from shards.storage import files, local_files
from shards.storage.commands import spell_program
from shards.storage.entries import Entry, list_entries
from shards.threads import run_in_threads

MOST_EVALUATIONS = 100
_REQUESTS = 8  # at once
_SMALLEST, _LARGEST = 1e-99, 1e99  # of the numbers that a chart can show
MOST_BYTES = 20_000_000  # of a result or of a sheet

_OWN_SHEET = re.compile(rf"step_(?:{layout.STEP})\.png")

_T = TypeVar("_T")


@dataclass(frozen=True)
class EvaluationFacts:
    """One result of launch/evaluate.py. The field `place` is its folder below RUN/evaluations."""

    metrics: dict[str, float]
    protocol: str = ""
    network: str = ""
    step: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    place: str = ""


@dataclass
class RunFacts:
    """What one run says of itself."""

    url: str  # absolute, so that what a page shows of it is right in every folder
    recipe: dict[str, Any] = field(default_factory=dict)  # all of recipe.json, by dotted names
    records: list[Record] = field(default_factory=list)
    evaluations: list[EvaluationFacts] = field(default_factory=list)
    views: tuple[int, bytes] | None = None  # the newest picture of the views, and its step
    sheet: tuple[str, bytes] | None = None  # the newest sheet of neighbors, and its place in RUN
    commit: dict[str, Any] = field(default_factory=dict)  # the newest commit.json
    state: str = ""  # in a word or two, "" when it is not known
    faults: list[str] = field(default_factory=list)  # what could not be read, and why

    @property
    def fields(self) -> dict[str, Any]:
        """Return the recipe's fields, without what else recipe.json has."""
        return {key: value for key, value in self.recipe.items() if key not in origin.FACTS}

    @property
    def total_steps(self) -> int | None:
        """Return the number of steps of the whole run. It is None when nobody has noted it."""
        total = self.recipe.get(layout.TOTAL)
        return total if type(total) is int and total >= 0 else None

    @property
    def images(self) -> int | None:
        """Return the number of training images. It is None when no checkpoint has noted it."""
        begun = self.commit.get("origin")
        images = begun.get("samples") if isinstance(begun, dict) else None
        return images if type(images) is int and images > 0 else None

    @property
    def saved(self) -> int | None:
        """Return the step of the newest checkpoint, or None when there is none."""
        step = self.commit.get("step")
        return step if type(step) is int and step >= 0 else None

    @property
    def processes(self) -> int | None:
        """Return the number of processes at the newest step of which it is known."""
        for record in reversed(self.records):
            keys = ("images_per_second", "images_per_second_device")
            whole, own = (as_number(record.get(key)) for key in keys)
            if whole and own and 0 < own <= whole < math.inf:
                return round(whole / own)
        return None

    @property
    def torch(self) -> str | None:
        """Return the version of torch that wrote the newest checkpoint."""
        packages = self.commit.get("packages")
        found = packages.get("torch") if isinstance(packages, dict) else None
        return found[:40] if isinstance(found, str) else None

    def last(self, key: str) -> Any:
        """Return the newest value of a key, or None."""
        values = (record.get(key) for record in reversed(self.records))
        return next((value for value in values if value is not None), None)

    def numbers(self, key: str) -> tuple[Values, Values]:
        """Return the steps [N] that have a value of `key`, and the values [N].

        A value that is not finite is NaN. So is null where the key is `loss`, because that is how
        a step with no finite loss is logged.
        """
        found = [
            (record["step"], math.nan if record[key] is None else as_number(record[key]))
            for record in self.records
            if key in record and (record[key] is not None or key == "loss")
        ]
        pairs = [pair for pair in found if pair[1] is not None]
        steps, values = (
            np.array([p[0] for p in pairs], float),
            np.array([p[1] for p in pairs], float),
        )
        return steps, np.where(np.isfinite(values), values, np.nan)


def as_number(value: object) -> float | None:
    """Return a logged value as a number, which may be infinite, and None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return math.inf
    return number if _SMALLEST <= abs(number) <= _LARGEST else 0.0 if abs(number) < 1 else math.inf


def collect(url: str, name: str = "RUN", pictures: bool = True, *, left: bool = False) -> RunFacts:
    """Read what a run has written. What cannot be read is a fault, unless nothing can be.

    Args:
        name: What the user gave the URL for, for messages.
        pictures: Whether the picture of the views is needed.
        left: Whether this process, which may still hold the run, trains it no more.

    Raises InputError when there is no run at the URL, and OSError when it cannot be read at all.
    """
    files.check(url, name)
    if not url.strip():
        raise InputError(f"{name} is empty: give the URL of a run")
    run = RunFacts(local_files.absolute(url.rstrip("/") or url))
    names = {entry.name for entry in list_entries(url)}
    if layout.RECIPE in names:
        run.recipe = _attempt(run, layout.RECIPE, lambda: read_recipe(run.url)) or {}
    elif not names & {layout.JSONL, layout.PARTS}:
        mend = "give the URL of a run"
        given = url.rstrip("/") or url
        if (home := origin.home(given)) != given:
            mend = f"give {files.redact(home)}, whose checkpoint it is"
        elif names:
            mend = f"`{spell_program('evaluate.py', 'runs', url)}` lists the runs below it"
        raise InputError(
            f"{name} {files.redact(url)}: is no run, because it has neither {layout.RECIPE} nor "
            f"{layout.JSONL}: {mend}"
        )
    else:
        run.faults.append(f"{layout.RECIPE} is missing")
    run.records = (
        _attempt(run, layout.JSONL, lambda: journal.read(run.url, report=run.faults.append)) or []
    )
    sheets: list[tuple[str, Entry]] = []
    if layout.EVALUATIONS in names:
        _attempt(run, layout.EVALUATIONS, lambda: sheets.extend(_read_evaluations(run)))
    if layout.NEIGHBOURS in names:
        _attempt(run, layout.NEIGHBOURS, lambda: sheets.extend(_list_sheets(run.url)))
    if sheets:
        place, entry = max(sheets, key=lambda found: (found[1].modified or 0, found[0]))
        run.sheet = _attempt(run, place, lambda: _read_sheet(run.url, place, entry))
    if layout.CHECKPOINTS in names:
        run.commit = _attempt(run, "the newest commit.json", lambda: _read_commit(run.url)) or {}
    run.state = _attempt(run, layout.LEASE, lambda: _tell_state(run, left)) or ""
    if pictures:
        run.views = _attempt(run, "the picture of the views", lambda: find_views(run.url))
    return run


def read_recipe(url: str) -> dict[str, Any]:
    """Read all of a run's recipe.json. Raises ValueError when it is damaged, and OSError."""
    return _parse_object(files.read(files.join(url, layout.RECIPE)))


def _parse_object(content: bytes) -> dict[str, Any]:
    document = parse_json(content)
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    return document


def _tell_state(run: RunFacts, left: bool) -> str:
    last = run.records[-1] if run.records else {}
    done = run.total_steps is not None and last.get("step") == run.total_steps
    return tell_state(run.url, done=done, stopped_early=bool(last.get(STOPPED_EARLY)), left=left)


def _read_commit(url: str) -> dict[str, Any]:
    """Read the newest commit.json, which nothing here relies on, without its verification."""
    for step in reversed(checkpoint.steps(url)):
        place = checkpoint.step_url(url, step)
        found = {entry.name: entry for entry in list_entries(place)}
        if checkpoint.COMMIT in found:  # otherwise it is being written
            commit = files.join(place, checkpoint.COMMIT)
            return _parse_object(_read_bounded(commit, found[checkpoint.COMMIT]))
    return {}


def _attempt(run: RunFacts, what: str, read: Callable[[], _T]) -> _T | None:
    """Return what `read` returns, or note a fault of the run and return None."""
    try:
        return read()
    except (OSError, ValueError, InputError) as error:
        run.faults.append(f"{what} cannot be read: {files.redact(str(error))}")
        return None


def list_evaluations(url: str) -> list[tuple[str, Entry]]:
    """List the results and sheets below RUN/evaluations with their folders, newest step first."""
    home = files.join(url, layout.EVALUATIONS)
    steps = [entry.name for entry in list_entries(home) if entry.is_folder]

    def list_below(folders: list[str]) -> list[tuple[str, Entry]]:
        listed = run_in_threads(
            lambda folder: list_entries(files.join(home, folder)), folders, _REQUESTS
        )
        return [(f, entry) for f, found in zip(folders, listed, strict=True) for entry in found]

    folders = [f"{step}/{entry.name}" for step, entry in list_below(steps) if entry.is_folder]
    found = list_below(sorted(folders, reverse=True))
    return [
        (folder, entry) for folder, entry in found if entry.name in (layout.RESULT, layout.SHEET)
    ]


def _read_evaluations(run: RunFacts) -> list[tuple[str, Entry]]:
    """Read the results below RUN/evaluations, and list the sheets of neighbors by their places."""
    home, there = files.join(run.url, layout.EVALUATIONS), list_evaluations(run.url)
    results = [(folder, entry) for folder, entry in there if entry.name == layout.RESULT]
    if len(results) > MOST_EVALUATIONS:
        run.faults.append(f"{len(results) - MOST_EVALUATIONS} older evaluations are left out")
    taken = results[:MOST_EVALUATIONS]
    read = run_in_threads(lambda one: _read_result(run, home, *one), taken, _REQUESTS)
    run.evaluations = [one for one in read if one is not None]
    sheets = [(place, entry) for place, entry in there if entry.name == layout.SHEET]
    return [(f"{layout.EVALUATIONS}/{place}/{layout.SHEET}", entry) for place, entry in sheets]


def _list_sheets(url: str) -> list[tuple[str, Entry]]:
    """List the sheets of neighbors that the run drew itself, by their places."""
    found = list_entries(files.join(url, layout.NEIGHBOURS))
    return [(f"{layout.NEIGHBOURS}/{e.name}", e) for e in found if _OWN_SHEET.fullmatch(e.name)]


def _read_result(run: RunFacts, home: str, folder: str, entry: Entry) -> EvaluationFacts | None:
    def read() -> EvaluationFacts:
        content = _read_bounded(files.join(home, folder, layout.RESULT), entry)
        return build(EvaluationFacts, _parse_object(content) | {"place": folder})

    return _attempt(run, f"{folder}/{layout.RESULT}", read)


def _read_sheet(url: str, place: str, entry: Entry) -> tuple[str, bytes]:
    return place, _read_bounded(files.join(url, place), entry)


def _read_bounded(url: str, entry: Entry) -> bytes:
    if entry.size > MOST_BYTES:
        raise ValueError(f"it has {entry.size:,} bytes, more than {MOST_BYTES:,}")
    return files.read(url)
