"""Name everything in the run directory RUN/, which may be at any URL.

RUN/recipe.json                       the resolved recipe of the last start
RUN/checkpoints/step_00000100/        one checkpoint (state/checkpoint.py)
RUN/lease/00000001.json               which job holds the run (state/lease.py)
RUN/compile/                          what torch.compile made (state/artefacts.py)
RUN/metrics.jsonl, RUN/metrics/       the log, line by line (log/journal.py)
RUN/events.out.tfevents.*             tensorboard's files (log/events.py)
RUN/trackers.json                     the run's id at trackers (log/tracker_ids.py)
RUN/profile/                          what --profile recorded (log/profiling.py)
RUN/evaluations/                      results of launch/evaluate.py (evaluation/session.py)
RUN/probe/                            packed folders of images (evaluation/probe_sets.py)
RUN/neighbours/step_00000100.png      images and their nearest neighbors (evaluation/sheet.py)
RUN/report.html                       what a browser shows of the run (engine/report)
RUN/debug_step/                       exists while --debug-step runs
RUN/replay/step_00000100/             what --replay found of a step (replay/report.py)
"""

import os
import re
from collections.abc import Callable
from typing import Any

from engine.log.journal import JSONL as JSONL
from engine.log.journal import PARTS as PARTS
from engine.log.profiling import PROFILE as PROFILE
from engine.log.tracker_ids import TRACKERS as TRACKERS
from shards.errors import InputError
from shards.storage import files, local_files

RECIPE = "recipe.json"
CHECKPOINTS = "checkpoints"
COMMIT = "commit.json"  # in the folder of a checkpoint
LEASE = "lease"
COMPILE = "compile"
EVALUATIONS = "evaluations"
REPORT = "report.html"

TOTAL = "total_steps"  # the key of recipe.json for the number of steps of the whole run
DEBUG_STEP = "debug_step"
REPLAY = "replay"
PROBE = "probe"
NEIGHBOURS = "neighbours"

RESULT, SHEET = "result.json", "neighbours.png"  # files in the folder of an evaluation

_FOLDERS = (
    *(CHECKPOINTS, LEASE, COMPILE, EVALUATIONS, PROBE, PROFILE, DEBUG_STEP, REPLAY),
    *(PARTS, NEIGHBOURS),
)
NAMES = (RECIPE, JSONL, TRACKERS, *_FOLDERS)


_FILES = (RECIPE, JSONL, "commit.json", "index.json", ".metadata")
MOST_STEPS = 10**18
STEP = "[0-9]{8}|[1-9][0-9]{8,17}"  # a step in a name: eight digits, or more where it needs more
_INSIDE = re.compile(rf"(.+)/{CHECKPOINTS}/step_(?:{STEP})(/.*)?$")


def check_run(url: str) -> None:
    """Raise InputError when `url`, where a run is to be written, names what lies in a folder.

    It is also raised when a file is in the place of the folder, and for a whole disk or bucket.
    """
    files.check_folder(url, "run")
    files.check_no_root(url, "run", "a run", "runs/mine")
    url = url.rstrip("/")
    folder, _, name = url.rpartition("/")
    if inside := _INSIDE.fullmatch(url):
        folder = inside[1]
    elif name not in _FILES and not name.endswith((".tar", ".distcp")):
        return
    raise InputError(
        f"run {files.redact(url)}: is inside of {files.redact(folder) or '.'}: give the folder of "
        "a run"
    )


def refuse_links(run: str, names: tuple[str, ...], remedy: str) -> None:
    """Raise InputError when one of the parts `names` of RUN is a link out of it.

    Two runs would share that part. Each would overwrite and remove what is the other's.

    Args:
        remedy: What else the user can do than take the link away, for the message.
    """
    if not files.is_local(run):
        return
    home = files.local_path(run)
    for name in names:
        if target := local_files.link_out(f"{home}/{name}", home):
            raise InputError(
                f"{files.redact(files.join(run, name))} is a link to {target}, out of the run: "
                f"what lies there would be overwritten and removed: take the link away, or {remedy}"
            )


def check_kinds(run: str) -> None:
    """Raise InputError when a file lies where RUN, or a part of it, has a folder, or vice versa.

    Otherwise a run whose folder of checkpoints is hidden by a file would begin anew.
    """
    if not files.is_local(run):
        return
    home = files.local_path(run)
    for name in ("", *NAMES):
        path, is_folder = f"{home}/{name}".rstrip("/") or "/", not name or name in _FOLDERS
        if os.path.lexists(path) and os.path.isdir(path) != is_folder:
            kinds = ("no folder", "a folder") if is_folder else ("a folder", "a file")
            place = files.redact(files.join(run, name) if name else f"run {run}")
            raise InputError(
                f"{place}: is {kinds[0]}, and a run has {kinds[1]} there: move it away, or give "
                "another --run-url"
            )


def find_missing(run: str, name: str) -> list[str]:
    """Return the folders that are made for RUN/`name` on a local disk, the deepest first."""
    if not files.is_local(run):
        return []
    return local_files.find_missing(files.local_path(files.join(run, name)))


def remove_debug_step(run: str, made: list[str], report: Callable[[str], None]) -> None:
    """Remove RUN/debug_step, and the folders `made` that are empty then."""
    url = files.join(run, DEBUG_STEP)
    files.discard(url, url, report)
    local_files.remove_empty(made)


def without_secrets(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a recipe, by dotted names, without what may be secret in their URLs."""
    return {k: files.redact(v) if isinstance(v, str) else v for k, v in fields.items()}


def read_recipe(run: str) -> dict[str, Any]:
    """Return the recipe of the last start in RUN, by dotted names.

    It is empty when there is none or it is damaged. Raises OSError when it cannot be read.
    """
    try:
        fields = files.read_json(files.join(run, RECIPE))
    except (FileNotFoundError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
