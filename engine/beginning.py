"""Decide where training begins and from which tensors: drawn, given, or another run's.

A run has one beginning. Its recipe.json and its checkpoints keep it (engine/state/origin.py), so a
later start needs neither the weights nor the other run, and notices when it is given others.
"""

from dataclasses import replace
from typing import NamedTuple

from engine.encoder.chosen import find_kind
from engine.encoder.start import FIELD, StartWeights, read_start
from engine.method.schedule import Ramp
from engine.processes.world import World
from engine.recipe import Recipe, in_todays_terms, method_fields
from engine.run import Run
from engine.state import checkpoint, origin
from engine.state.branch import Branch, Facts, plan
from engine.state.checkpoint import Commit
from engine.state.origin import Origin
from shards.errors import InputError
from shards.index import Index
from shards.storage import files


class Beginning(NamedTuple):
    """Say where training begins, and from which tensors."""

    step: int
    commit: Commit | None  # the state to load
    left_out: tuple[str, ...]  # parts of the state that are not loaded
    weights: StartWeights | None
    origin: Origin  # how the run began, for its recipe.json and its checkpoints
    ramp: Ramp  # of the learning rate
    text: str  # one line for the user; "" when nothing is to be said


def begin(recipe: Recipe, world: World, run: Run, train: Index) -> Beginning:
    """Decide how this job begins.

    All processes call it together, before the networks are built.

    Raises InputError when the weights or the branch do not fit the recipe, and when the run began
    from others.
    """
    start, classes, began = run.start, len(train.classes), run.origin
    step, weights, text = 0, None, ""
    left_out: tuple[str, ...] = ()
    if run.branches and start is not None:
        found = _branch(recipe, world, start, train)
        began = replace(start.origin, branched_from=found.point)
        step, left_out, text = found.point.step_here, found.left_out, found.text
    elif start is not None:
        _check_weights(recipe, world, run, began, classes)
        step = start.step
        text = f"resumed at step {step} from {files.redact(start.url)}"
    else:
        if run.recorded is not None:
            _check_given(recipe, run, run.recorded)
        if recipe.model.start:
            weights = read_start(
                recipe.model, classes, recipe.views.size, world, run.terminal.report
            )
            text = weights.report
            began = Origin(weights=weights.source)
            if run.recorded is not None and run.recorded.weights is not None:
                _check_digest(recipe, run, run.recorded.weights.digest, weights)
    began = replace(began, samples=train.samples)
    ramp = _ramp(recipe, began, train.samples)
    return Beginning(step, start, left_out, weights, began, ramp, text)


def _branch(recipe: Recipe, world: World, parent: Commit, train: Index) -> Branch:
    place = f"checkpoint.branch {files.redact(parent.url)}"
    known = parent.origin.weights
    given = recipe.model.start
    if given and not (known and origin.names_same(given, known.url)):
        raise InputError(
            f"{place}: a branch begins with the weights there, not with those of {FIELD} "
            f"{files.redact(given)}: leave one of the two out"
        )
    here = Facts(method_fields(recipe), train.digest, train.samples)
    same = parent.index_digest == train.digest
    samples = parent.origin.samples or (train.samples if same else 0)
    there = Facts(in_todays_terms(parent.method), parent.index_digest, samples)
    held = checkpoint.shapes(parent, world)
    found = plan(parent, there, here, held, len(train.classes))
    total = recipe.schedule.total_steps(train.samples, recipe.batch.size)
    if found.point.step_here >= total:
        raise InputError(
            f"{place}: the branch would begin at step {found.point.step_here}, and the recipe ends "
            f"at step {total}: give more --schedule.epochs, or an earlier checkpoint"
        )
    return found


def _ramp(recipe: Recipe, origin: Origin, samples: int) -> Ramp:
    """Return the ramp of the learning rate. Raises InputError when there is no branch for it."""
    check_ramp(recipe, origin)
    if origin.branched_from is None:
        return Ramp()
    steps = recipe.schedule.rewarm_steps(samples, recipe.batch.size)
    return Ramp(origin.branched_from.step_here, steps)


def check_ramp(recipe: Recipe, origin: Origin) -> None:
    """Raise InputError when the recipe has a ramp for a run that began otherwise than as a branch.

    `origin` is the beginning of the run.
    """
    if recipe.schedule.rewarm and origin.branched_from is None:
        raise InputError(
            f"schedule.rewarm {recipe.schedule.rewarm}: the ramp is that of a branch: give "
            "--checkpoint.branch URL too, or leave it out"
        )


def _check_weights(recipe: Recipe, world: World, run: Run, there: Origin, classes: int) -> None:
    """Raise InputError when the run goes on and the recipe names other weights than it began with.

    Nothing is read for the same URL. Another URL is read, because the weights may have moved. When
    it cannot be read, one line says so.
    """
    given, known = recipe.model.start, there.weights
    if there.branched_from is not None:
        return  # what the parent began with does not matter
    _check_given(recipe, run, there)
    if not given or known is None or origin.names_same(given, known.url):
        return
    try:
        world.on_main(lambda: find_kind(given, FIELD))
    except (InputError, OSError) as error:
        if world.main:
            run.terminal.report(
                f"{error}; the run began with the weights of {known.url} and goes on without them"
            )
        return
    weights = read_start(recipe.model, classes, recipe.views.size, world, run.terminal.report)
    _check_digest(recipe, run, known.digest, weights)


def _check_given(recipe: Recipe, run: Run, there: Origin) -> None:
    """Raise InputError when only one of the run and the recipe begins with given weights."""
    given, known = files.redact(recipe.model.start), there.weights
    if bool(given) == (known is not None) or there.branched_from is not None:
        return
    began = f"with the weights of {known.url}" if known else "with drawn weights"
    mend = f"give --{FIELD} {known.url}" if known else f"leave --{FIELD} out"
    raise InputError(
        f"{FIELD} {given or 'is not given'}: run {files.redact(run.url)} began {began}: {mend}, or "
        "give another --run-url"
    )


def _check_digest(recipe: Recipe, run: Run, there: str, weights: StartWeights) -> None:
    if weights.source.digest != there:
        raise InputError(
            f"{FIELD} {files.redact(recipe.model.start)}: these are not the weights that run "
            f"{files.redact(run.url)} began with (digest there {there}, here "
            f"{weights.source.digest}): give those, or another --run-url"
        )
