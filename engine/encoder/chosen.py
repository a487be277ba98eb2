"""Find what a user means by CHECKPOINT: a run's newest or best checkpoint, a step's, or a file."""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

from engine.processes.world import World
from engine.state import checkpoint, layout
from engine.state.best import check_key, find_bests
from engine.state.checkpoint import Commit
from engine.state.nearby import hint
from shards.errors import InputError
from shards.storage import files

TRIES = 3  # a training run may remove the checkpoint while it is read

_T = TypeVar("_T")


def find_kind(url: str, name: str = "CHECKPOINT") -> Literal["folder", "file"]:
    """Return whether a run or a checkpoint of one is at `url`, or a file.

    `name` is the field or argument that gave the URL, for the message. Raises InputError when
    nothing is there, or what is no checkpoint.
    """
    try:
        if files.list_names(url):
            return "folder"
    except PermissionError:  # Single objects may be readable all the same.
        folder = _can_read(files.join(url, checkpoint.COMMIT)) or not _can_read(url)
        return "folder" if folder else "file"
    if not files.exists(url):
        raise InputError(
            f"{name} {files.redact(url)}: nothing there; give the URL of a run, of one of "
            f"its checkpoints, or of a checkpoint file{hint(url)}"
        )
    if url.endswith((".json", ".jsonl", ".distcp")):
        raise InputError(f"{name} {files.redact(url)}: is no checkpoint{hint(url)}")
    return "file"


def _can_read(url: str) -> bool:
    try:
        return files.exists(url)
    except PermissionError:  # AWS answers so where nothing is, if folders may not be listed.
        return False


def find_commit(url: str, which: str, world: World, report: Callable[[str], None]) -> Commit:
    """Find a run's checkpoint `which`: latest, best, or the number of a step.

    All processes call it together. Raises InputError when there is none, or when it is damaged.
    """
    if which == "latest":
        return checkpoint.find(url, world, report, "CHECKPOINT")
    best = partial(_best_url, url, report)
    find = best if which == "best" else partial(_step_url, url, int(which))
    return checkpoint.verify(world.on_main(find), world)


def _best_url(run: str, report: Callable[[str], None]) -> str:
    """Return the URL of a run's best checkpoint, and report a better step that has none.

    Raises InputError when the log tells of no checkpoint.
    """
    place = files.redact(run)
    key = layout.read_recipe(run).get("checkpoint.keep_best") or "knn_top1"
    check_key(str(key), f"{files.redact(files.join(run, layout.RECIPE))}: checkpoint.keep_best")
    there = checkpoint.committed_steps(run)
    best, ever = find_bests(run, key, there)
    if best.step < 0:
        missing = f"no best checkpoint, because the log has no {key} of any"
        if ever.step >= 0:
            missing = f"no checkpoint of step {ever.step}, which has the largest {key} of the log"
        raise InputError(
            f"CHECKPOINT {place}: {missing}; give --checkpoint latest, or one of the steps: "
            f"{_list_steps(there)}"
        )
    if ever.value > best.value:
        report(
            f"{place}: {key} is largest at step {ever.step} ({ever.shown}), whose checkpoint is "
            f"not kept; taking that of step {best.step} ({best.shown}). --checkpoint.keep-best "
            f"{key} of a training keeps the best one"
        )
    return checkpoint.step_url(run, best.step)


def _list_steps(there: list[int]) -> str:
    return ", ".join(map(str, there)) or "none"


def _step_url(run: str, step: int) -> str:
    there = checkpoint.steps(run)
    if step not in there:
        raise InputError(
            f"CHECKPOINT {files.redact(run)}: no checkpoint of step {step}; there are: "
            f"{_list_steps(there)}"
        )
    return checkpoint.step_url(run, step)


def read_newest(
    url: str, world: World, report: Callable[[str], None], read: Callable[[], _T]
) -> _T:
    """Call `read`, which reads a run's newest checkpoint, again if the run went on meanwhile.

    A training removes old checkpoints. All processes call it together.
    """
    for attempt in range(1, TRIES + 1):
        there = world.on_main(partial(_steps, url))
        try:
            return read()
        except (InputError, OSError):
            changed = world.on_main(partial(_steps, url)) != there
            if not changed or attempt == TRIES:
                raise
            report(f"{files.redact(url)}: the run went on meanwhile; taking a newer checkpoint")
    raise AssertionError("unreachable")


def _steps(url: str) -> list[int]:
    """List the checkpoints of a run. The list is empty where folders may not be listed."""
    try:
        return checkpoint.steps(url)
    except PermissionError:
        return []
