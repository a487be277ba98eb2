"""Define the two kinds of config fields and their bounds, and functions on all configs.

A field is a *method* field unless it is marked `Operation[...]`. Method fields decide what is
computed, and must match when a run resumes. Operation fields may change at every start. Bounds are
annotations too: `Annotated[int, Interval(ge=1)]`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Interval, MaxLen, MinLen

from shards.errors import InputError

_T = TypeVar("_T")

OPERATION = "operation"
Operation = Annotated[_T, OPERATION]

RISING = "rising"  # In a tuple marked so, no value is smaller than the one before.

_LONGEST = 200  # characters of a value in a message
_MOST_DIFFERENCES = 100


class Rule:
    """An annotation on a field that checks the type and the bounds of a value itself."""

    def check(self, name: str, value: Any) -> None:
        """Raise InputError naming the field `name` when it cannot have this value."""
        raise NotImplementedError


UnitInterval = Annotated[float, Interval(ge=0, le=1)]
Range = Annotated[tuple[float, float], Interval(gt=0), RISING]


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield (dotted name, value, annotations) of every field of a config and of nested configs.

    A field whose type is a union of config classes is also yielded itself, with the name of its
    class as the value.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for entry in dataclasses.fields(config):
        value, hint, name = getattr(config, entry.name), hints[entry.name], prefix + entry.name
        annotations = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if not dataclasses.is_dataclass(value):
            yield name, value, annotations
            continue
        if not dataclasses.is_dataclass(get_args(hint)[0] if annotations else hint):
            # The field is a union, so the class is part of its value.
            yield name, type(value).__name__, ()
        yield from walk(value, name + ".")


def flatten(config: Any) -> dict[str, Any]:
    """Return {dotted name: value} of all fields that `walk` finds in a config."""
    return {name: value for name, value, _ in walk(config)}


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """List the fields that differ between two recipes, as `name: there VALUE, here VALUE`.

    Long values are cut, and so is the list, because one of the recipes may be a stranger's.
    """
    names = sorted(there.keys() | here.keys())
    found = [
        f"{_cut(name)}: there {_cut(there.get(name, 'absent'))}, "
        f"here {_cut(here.get(name, 'absent'))}"
        for name in names
        if there.get(name) != here.get(name)
    ]
    more = len(found) - _MOST_DIFFERENCES
    return [*found[:_MOST_DIFFERENCES], f"{more} more"] if more > 0 else found


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def check_bounds(config: Any, spell: Callable[[str], str] = str) -> None:
    """Raise InputError for the first field of a config that is outside its bounds.

    None is within all bounds. In a tuple, every value must be within the bounds.

    Args:
        spell: Turns a dotted name into the name that the message uses for the field.
    """
    for name, value, annotations in walk(config):
        check_annotations(spell(name), value, annotations)


def check_annotations(name: str, value: Any, annotations: tuple[Any, ...]) -> None:
    """Raise InputError naming the field `name` when its value is outside the annotated bounds."""
    values = value if isinstance(value, tuple) else (value,)
    for bound in annotations:
        if isinstance(bound, Rule):
            bound.check(name, value)
        if isinstance(bound, MinLen) and len(value) < bound.min_length:
            raise InputError(f"{name} needs at least {bound.min_length} value")
        if isinstance(bound, MaxLen) and len(value) > bound.max_length:
            raise InputError(f"{name} must have at most {bound.max_length} values")
        if isinstance(bound, Interval):
            for one in values:
                check_range(name, one, bound)
        if bound == RISING and any(a > b for a, b in itertools.pairwise(values)):
            raise InputError(f"{name} must be two rising numbers, not {value}")


def as_flag(name: str) -> str:
    """Return a field's name in the form of a command-line option."""
    return "--" + name.replace("_", "-")


def as_option(name: str, value: Any) -> str:
    """Return the words of a command line that give a field this value."""
    if isinstance(value, bool):
        before, dot, last = name.rpartition(".")
        return as_flag(name if value else f"{before}{dot}no_{last}")
    return f"{as_flag(name)} {_cut(value)}"


def check_range(name: str, value: Any, bound: Interval) -> None:
    """Raise InputError naming the field `name` unless the value is None or in the interval."""
    if value is None:
        return
    inside = (
        (bound.ge is None or value >= bound.ge)
        and (bound.gt is None or value > bound.gt)
        and (bound.le is None or value <= bound.le)
        and (bound.lt is None or value < bound.lt)
    )
    if inside and value == value:  # NaN is in no interval.
        return
    limits = [
        f"{word} {_shown(limit)}"
        for word, limit in (
            ("at least", bound.ge),
            ("more than", bound.gt),
            ("at most", bound.le),
            ("less than", bound.lt),
        )
        if limit is not None
    ]
    wanted = " and ".join(limits)
    if bound.ge is not None and bound.le is not None:
        wanted = f"from {_shown(bound.ge)} to {_shown(bound.le)}"
    raise InputError(f"{name} must be {wanted}, not {value}")


def _shown(limit: Any) -> str:
    return f"{limit:g}" if float(f"{limit:g}") == limit else str(limit)
