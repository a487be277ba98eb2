"""Find the checkpoint that a job continues from, and refuse one of another recipe or other data."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from engine.processes.world import World
from engine.recipe import Recipe, in_todays_terms, method_fields
from engine.state import checkpoint, layout, origin
from engine.state.checkpoint import Commit
from engine.state.origin import Origin
from shards.errors import InputError
from shards.fields import differences, flatten
from shards.storage import commands, files, misplaced


class Found(NamedTuple):
    """Hold what a job finds when it begins."""

    commit: Commit | None  # the checkpoint to continue from; None when the run begins
    branches: bool  # whether that is the parent's, of which this run becomes a branch
    recorded: Origin | None  # what RUN/recipe.json says of the beginning; None without the file


def find_checkpoint(
    recipe: Recipe,
    index_digest: str,
    world: World,
    report: Callable[[str], None],
    before: float = math.inf,
) -> Found:
    """Find the newest checkpoint of the run or, if it has none, the one that the recipe names.

    Checkpoints of the run count only when their step is less than `before`.

    All processes call it together. Raises InputError when the checkpoint is of another recipe or
    of other data, unless it is that of `checkpoint.branch`, and when the run began otherwise than
    `checkpoint.branch` says.
    """
    resume, branch = recipe.checkpoint.resume, recipe.checkpoint.branch
    recorded = world.on_main(lambda: _read_origin(recipe.run))
    commit = checkpoint.latest(recipe.run, world, report, before)
    remedy = "give another --run-url"
    known = recorded if commit is None else commit.origin
    if known is not None:
        _check_branch(recipe, known, begun=commit is not None)
    if commit is None and resume:
        world.on_main(lambda: _refuse_file(resume, "checkpoint.resume"))
        commit = checkpoint.find(resume, world, report)
        remedy = "give another --checkpoint.resume"
    elif commit is None and branch:
        world.on_main(lambda: _refuse_file(branch, "checkpoint.branch"))
        return Found(_find_parent(recipe, recorded, world, report), True, recorded)
    if commit is not None:
        there = commit.method, commit.index_digest
        _refuse_other(recipe, index_digest, commit.url, *there, remedy)
    return Found(commit, False, recorded)


def _read_origin(run: str) -> Origin | None:
    """Return what RUN/recipe.json says of the beginning; None when there is no such file."""
    fields = layout.read_recipe(run)
    return origin.of_fields(fields) if fields else None


def _find_parent(
    recipe: Recipe, recorded: Origin | None, world: World, report: Callable[[str], None]
) -> Commit:
    """Find the checkpoint that the run branches from.

    A start that was cut off before its first checkpoint has chosen it already, and this run keeps
    to it though the parent may have newer ones.
    """
    url, point = recipe.checkpoint.branch, recorded.branched_from if recorded else None
    if point is None:
        return checkpoint.find(url, world, report, "checkpoint.branch")
    if origin.home(url) == url.rstrip("/"):
        url = checkpoint.step_url(url, point.step)
    mend = f"run {files.redact(recipe.run)} branched from it and has no checkpoint yet"
    try:
        commit = checkpoint.verify(url, world)
    except InputError as error:
        raise InputError(f"{error}; {mend}: give another --run-url") from None
    if commit.digest != point.digest:
        raise InputError(f"{point.url}: has been written anew; {mend}: give another --run-url")
    return commit


def _check_branch(recipe: Recipe, known: Origin, begun: bool) -> None:
    """Raise InputError when the run began otherwise than `checkpoint.branch` says.

    Args:
        known: How the run began.
        begun: Whether the run has a checkpoint, so that it goes on without the parent.
    """
    given, point = recipe.checkpoint.branch, known.branched_from
    run = files.redact(recipe.run)
    if given and point is None:
        raise InputError(
            f"checkpoint.branch {files.redact(given)}: run {run} has begun without it: give "
            "another --run-url, where the branch goes"
        )
    if given and point is not None and not origin.names_same(given, point.url):
        raise InputError(
            f"checkpoint.branch {files.redact(given)}: run {run} branched from {point.url}: give "
            "that, or another --run-url for another branch"
        )
    if point is not None and not (given or begun or recipe.checkpoint.resume):
        raise InputError(
            f"run {run} branched from {point.url} and has no checkpoint to go on from: give "
            f"--checkpoint.branch {commands.quote(point.url)}, or another --run-url"
        )


def _refuse_file(url: str, name: str) -> None:
    """Raise InputError when `url` is a file, which has weights at most and no full state."""
    try:
        if files.list_names(url) or not files.exists(url):
            return
    except PermissionError:  # `checkpoint.find` tells what is missing
        return
    place = files.redact(url)
    raise InputError(
        f"{name} {place}: is a file, and only a run or one of its checkpoints has a full state: to "
        f"start a new run from the weights of a file, give --model.start {commands.quote(url)}"
    )


def check_recipe(recipe: Recipe, digest: str | None, report: Callable[[str], None]) -> None:
    """Raise InputError when RUN has a run of another recipe, or of other data if that is known."""
    url = files.join(recipe.run, layout.RECIPE)
    above = misplaced.folder_of(recipe.run)
    if misplaced.last_name(recipe.run) == layout.CHECKPOINTS and layout.read_recipe(above):
        raise InputError(
            f"run {files.redact(recipe.run)}: is inside of a run: give {files.redact(above)}"
        )
    try:
        there = files.read_json(url)
        if not isinstance(there, dict):
            raise ValueError
    except FileNotFoundError:
        return
    except ValueError:
        report(f"{files.redact(url)} is damaged and was not compared with this recipe")
        return
    operations = flatten(recipe).keys() - method_fields(recipe).keys()
    method = {name: there[name] for name in there.keys() - operations - origin.FACTS}
    _refuse_other(recipe, digest, recipe.run, method, there.get(origin.DIGEST))


def _refuse_other(
    recipe: Recipe,
    index_digest: str | None,
    url: str,
    method: dict[str, Any],
    digest_there: str | None,
    remedy: str = "give another --run-url",
) -> None:
    """Raise InputError, listing the differences, unless `url` belongs to this recipe and data.

    Args:
        method: The method fields found at `url`, by dotted name.
        digest_there: The digest of the training data found at `url`.
        remedy: What else the user could do, for the message.
    """
    found = differences(in_todays_terms(method), method_fields(recipe))
    if index_digest is not None and digest_there != index_digest:
        found.append(f"digest of data.train: there {digest_there}, here {index_digest}")
    if found:
        place = files.redact(url)
        raise InputError(
            f"{place} is of another recipe or data set ({'; '.join(found)}): "
            f"set these back, or {remedy}, or go on from its state with these changes in a new "
            f"run, by another --run-url and --checkpoint.branch {commands.quote(url)}"
        )
