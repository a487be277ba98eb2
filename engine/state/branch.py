"""Plan a branch: a new run that goes on from another run's full state with changed method fields.

The new run begins with the parent's tensors and does from there what a run of the new recipe does
at the same place of the training. recipes/README.md defines it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Size

from engine.method.average import PART
from engine.method.torchvision_encoder import is_for_one_size
from engine.state.checkpoint import Commit
from engine.state.origin import BranchPoint
from shards.documents import shown
from shards.errors import InputError
from shards.fields import as_option, differences
from shards.storage import files

_KIND = "model.encoder"
_SHAPES = (_KIND, "model.hidden", "model.projection")
_ORDER = ("seed", "batch.size", "data.streams")  # with the data, all that decides the order
_DATA = "digest of data.train"
# The fields that decide the optimizer's state. What adapt scales is of another size in it.
_OPTIMIZER = ("optimizer", "optimizer.name", "optimizer.options", "optimizer.adapt")
_HEAD = "online.classifier.weight"
_LONGEST = 200  # characters of a value that a stranger's recipe may have
_MOST = 200  # changed fields that are kept


@dataclass(frozen=True)
class Facts:
    """Hold what decides where a run of a recipe is at a step."""

    method: Mapping[str, Any]  # the method fields by dotted name
    index_digest: str
    samples: int  # images of the training set; 0 where it is not known


@dataclass(frozen=True)
class Branch:
    """Say where a branch begins, and what of the parent's state it does not take."""

    point: BranchPoint
    left_out: tuple[str, ...]  # parts of the state, by the beginning of their dotted names
    text: str  # one line for the user


def plan(
    parent: Commit, there: Facts, here: Facts, held: Mapping[str, Size], classes: int
) -> Branch:
    """Plan the branch from the checkpoint `parent`.

    Args:
        there: The facts of the parent's run.
        here: The facts of the new run.
        held: The shapes of the tensors in the checkpoint, by their dotted names.
        classes: Number of classes of the new run's online head; 0 when it has none.

    Raises InputError when the new recipe has networks of other shapes.
    """
    place = f"checkpoint.branch {files.redact(parent.url)}"
    _check_shapes(place, there.method, here.method)
    step = convert_step(parent.step, there, here, place)
    changed = _changes(there, here)
    order = _describe_order(parent.step, step, there, here)
    point = BranchPoint(files.redact(parent.url), parent.step, parent.digest, step, order, changed)
    left_out, drawn = _left_out(there.method, here.method, held, classes)
    listed = differences(_with_data(there), _with_data(here))
    told = [
        f"branched at step {step} from {point.url}"
        + (f" (its step {parent.step})" if step != parent.step else ""),
        f"changed: {'; '.join(listed)}" if listed else "no method field is changed",
        order,
        *drawn,
    ]
    return Branch(point, left_out, "; ".join(told))


def convert_step(step: int, there: Facts, here: Facts, place: str) -> int:
    """Return the new run's step at the same position, counted in epochs.

    Where the number of the parent's images is not known, it counts in images.
    """
    size = there.method.get("batch.size")
    if type(size) is not int or size < 1:
        raise InputError(f"{place}: its recipe is damaged: batch.size is {shown(size)}")
    before = there.samples or here.samples
    return step * size * here.samples // (before * int(here.method["batch.size"]))


def without(state: dict[str, Any], left_out: tuple[str, ...]) -> dict[str, Any]:
    """Return the nested dicts of `state` without the parts that are left out."""
    return _keep(state, lambda name: not any(f"{name}.".startswith(f"{p}.") for p in left_out))


def _keep(state: dict[str, Any], wanted: Callable[[str], bool], path: str = "") -> dict[str, Any]:
    return {
        key: _keep(value, wanted, f"{path}{key}.") if isinstance(value, dict) else value
        for key, value in state.items()
        if wanted(f"{path}{key}")
    }


def _check_shapes(place: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    sized = is_for_one_size(here.get(f"{_KIND}.name"))
    shaping = (*_SHAPES, "views.size") if sized else _SHAPES
    mine = {name: value for name, value in here.items() if name.startswith(shaping)}
    theirs = {name: there[name] for name in mine if name in there}
    if found := differences(theirs, mine):
        flags = " ".join(as_option(n, v) for n, v in theirs.items() if v != mine[n])
        mend = f"give {flags}, or take"
        if theirs.get(_KIND) != mine.get(_KIND):
            mend = "use a recipe whose encoder is of that kind, or take"
        raise InputError(
            f"{place}: a branch keeps the shapes of the networks ({'; '.join(found)}): {mend} the "
            "weights alone by --model.start in place of --checkpoint.branch"
        )


def _changes(there: Facts, here: Facts) -> dict[str, Any]:
    theirs, mine = _with_data(there), _with_data(here)
    every = sorted(theirs.keys() | mine.keys())
    names = [name for name in every if theirs.get(name) != mine.get(name)]
    return {
        name[:_LONGEST]: {
            "there": _plain(theirs.get(name, "absent")),
            "here": _plain(mine.get(name, "absent")),
        }
        for name in names[:_MOST]
    }


def _with_data(facts: Facts) -> dict[str, Any]:
    return {**facts.method, _DATA: facts.index_digest}


def _plain(value: Any) -> Any:
    """Return a value as it is if recipes have such, and else a short text about it."""
    values = value if isinstance(value, list | tuple) else [value]
    plain = all(
        isinstance(one, bool | int | float | None) or (type(one) is str and len(one) <= _LONGEST)
        for one in values
    )
    return value if plain and len(values) <= _LONGEST else shown(value)


def _describe_order(step_there: int, step: int, there: Facts, here: Facts) -> str:
    names = [name for name in _ORDER if there.method.get(name) != here.method.get(name)]
    if there.index_digest != here.index_digest:
        names = ["data.train", *names]
    if not names:
        return "the order of the images continues"
    return (
        f"the order of the images begins anew with step {step} ({', '.join(names)} changed), so "
        "images of this epoch may come again"
        + (f"; the position in epochs is kept: step {step_there} there" * (step != step_there))
    )


def _left_out(
    there: Mapping[str, Any], here: Mapping[str, Any], held: Mapping[str, Size], classes: int
) -> tuple[tuple[str, ...], list[str]]:
    """Return the parts of the state that the parent does not have, and lines about them."""
    parts, told = [], []
    head = next(iter(held.get(_HEAD, ())), 0)
    if classes and classes != head:
        parts += ["online.classifier", "optimizer.classifier"]
        told.append(f"the online head is drawn anew: {head} classes there, {classes} here")
    if any(there.get(name) != here.get(name) for name in _OPTIMIZER):
        parts.append("optimizer")
        told.append("the optimizer begins anew")
    if here.get("average.rate") and not any(name.startswith(f"{PART}.") for name in held):
        parts.append(PART)
        told.append("the average of the encoder begins with the online weights there")
    if "guard.scale" not in held:
        parts.append("guard.scale")
    return tuple(parts), told
