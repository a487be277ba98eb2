"""Find what a user may have meant who named a run or a checkpoint that is not there."""

import difflib
import re

from engine.state.layout import CHECKPOINTS, COMMIT, RECIPE, STEP
from shards.errors import InputError
from shards.storage import files, misplaced

_MOST = 10  # steps that are listed
_FEW = 3  # runs that are
_WEIGHTS = (".safetensors", ".pth")  # of an export or a fine-tuning


def tell_missing(url: str, takes_files: bool) -> str:
    """Say that no checkpoint is at `url`, whether anything is, and what may be meant.

    Args:
        takes_files: Files of weights, as an export has them, are taken as well.
    """
    missing = "no committed checkpoint there" if _list(url) else "nothing there"
    return missing + hint(url, takes_files)


def hint(url: str, takes_files: bool = True) -> str:
    """Return the end of a message that no checkpoint is at `url`, which says where one is near."""
    near = misplaced.find_near(url, COMMIT)[-1:] or misplaced.find_near(url, RECIPE)
    if near:
        return f"; give {files.redact(near[0])}"
    if weights := [name for name in _list(url) if name.endswith(_WEIGHTS) and "head." not in name]:
        place = files.redact(files.join(url, max(weights)))  # safetensors before pth
        use = f"give {place}" if takes_files else f"--model.start {place} starts from its weights"
        return f"; it holds files of weights: {use}"
    above = misplaced.folder_of(url)
    if misplaced.last_name(above) == CHECKPOINTS:
        run = misplaced.folder_of(above)
        return _hint_at_steps(url, above) if _list(run) else hint(run, takes_files)
    return _hint_at_names(url, takes_files)


def _hint_at_steps(url: str, folder: str) -> str:
    """Return what the checkpoints in a run's folder of checkpoints are."""
    steps = sorted(
        int(name[5:]) for name in _list(folder) if re.fullmatch(f"step_(?:{STEP})", name)
    )
    place = files.redact(folder)
    if not steps:
        return f"; {place} holds no checkpoint"
    given = re.search("[0-9]{1,18}$", misplaced.last_name(url))
    if given and int(given[0]) in steps:
        return f"; give {place}/step_{int(given[0]):08d}"
    listed = ", ".join(map(str, steps[-_MOST:]))
    some = "steps" if len(steps) <= _MOST else f"{len(steps):,} steps, the last of them"
    return f"; {place} holds the {some} {listed}: give {place}/step_{steps[-1]:08d}, for instance"


def _hint_at_names(url: str, takes_files: bool) -> str:
    """Return the nearest name beside `url` that is a run's, a checkpoint's or a file's.

    Where none is near, some runs are listed.
    """
    above, name = misplaced.folder_of(url), misplaced.last_name(url)
    if name in (beside := _list(above)):
        return ""
    for near in difflib.get_close_matches(name, beside, n=3):
        place = files.join(above, near)
        held = set(_list(place))
        if held & {RECIPE, COMMIT} or (takes_files and near.endswith(_WEIGHTS) and not held):
            return f"; did you mean {files.redact(place)}?"
    runs = [files.join(above, one) for one in beside[: misplaced.MOST]]
    runs = [files.redact(run) for run in runs if RECIPE in _list(run)][:_FEW]
    return f"; runs beside it: {', '.join(runs)}" if runs else ""


def _list(url: str) -> list[str]:
    """List the names in a folder. What cannot be read counts as not there."""
    try:
        return files.list_names(url)
    except (OSError, InputError):
        return []
