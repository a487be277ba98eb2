"""Config fields: the two kinds of them, and what all configs have in common.

A field is *method* unless it is marked `Operation[...]`: method fields decide what is computed and
must match to resume; operation fields are free to change at every start.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

_T = TypeVar("_T")

OPERATION = "operation"
Operation = Annotated[_T, OPERATION]


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(dotted name, value, annotations) of every field of a config and of the configs in it.

    A field that is one of several config classes also stands there itself, with its class's name.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for entry in dataclasses.fields(config):
        value, hint, name = getattr(config, entry.name), hints[entry.name], prefix + entry.name
        if not dataclasses.is_dataclass(value):
            yield name, value, get_args(hint)[1:] if get_origin(hint) is Annotated else ()
            continue
        if not dataclasses.is_dataclass(hint):  # a union: which class it is belongs to the value
            yield name, type(value).__name__, ()
        yield from walk(value, name + ".")


def flatten(config: Any) -> dict[str, Any]:
    """{dotted name: value} of a config's fields, as `walk` finds them."""
    return {name: value for name, value, _ in walk(config)}


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """`name: there -> here` for every field that two recipes do not share."""
    names = sorted(there.keys() | here.keys())
    return [
        f"{name}: there {there.get(name, 'absent')}, here {here.get(name, 'absent')}"
        for name in names
        if there.get(name) != here.get(name)
    ]
