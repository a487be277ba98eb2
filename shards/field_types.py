"""Check that the values of a config have the types of their fields, which Python does not.

A config that a user wrote in Python may hold anything. The message names the field and what it
takes.
"""

import dataclasses
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from shards.documents import shown
from shards.errors import InputError
from shards.fields import Rule

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    types.NoneType: "None",
}


def check_types(config: Any, prefix: str = "") -> None:
    """Raise InputError for the first field of a config, or of a nested one, of a wrong type."""
    hints = get_type_hints(type(config), include_extras=True)
    for entry in dataclasses.fields(config):
        hint, name = hints[entry.name], prefix + entry.name
        value = getattr(config, entry.name)
        rules = [note for note in get_args(hint)[1:] if isinstance(note, Rule)]
        for rule in rules if get_origin(hint) is Annotated else ():
            rule.check(name, value)
        if not rules and not _fits(hint, value):
            raise InputError(f"{name} takes {describe(hint)}, not {_given(hint, value)}")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_types(value, name + ".")


def _fits(hint: Any, value: Any) -> bool:
    origin, given = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return _fits(given[0], value)
    if origin in (Union, types.UnionType):
        return any(_fits(one, value) for one in given)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in given)
    if origin is tuple:
        if type(value) is not tuple:
            return False
        wanted = given[:1] * len(value) if given[-1] is ... else given
        return len(value) == len(wanted) and all(map(_fits, wanted, value))
    if dataclasses.is_dataclass(hint):  # recipe.json and the command line know this class alone
        return type(value) is hint
    if hint in (int, float, bool):  # True is no number, and a whole number is a number
        number = type(value) is int or isinstance(value, float)  # also numpy's float64
        return type(value) is hint or (hint is float and number)
    return isinstance(value, origin or hint)


def describe(hint: Any) -> str:
    """Return what a field with this type takes, for messages."""
    origin, given = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(given[0])
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, given))
    if origin is Literal:
        return "one of " + ", ".join(map(str, given))
    if origin is tuple:
        number = "" if given[-1] is ... else f"{len(given)} "
        kinds = " and ".join(dict.fromkeys(describe(one) for one in given if one is not ...))
        return f"a tuple of {number}values, each {kinds}"
    if hint in _WORDS:
        return _WORDS[hint]
    name = getattr(hint, "__name__", str(hint))
    return f"{'an' if name[:1] in 'AEIO' else 'a'} {name}"


def _given(hint: Any, value: Any) -> str:
    """Return the value as a message shows it, with the one that was probably meant."""
    if isinstance(value, type):
        return (
            f"the class {value.__name__}"
            + f": write {value.__name__}()" * dataclasses.is_dataclass(value)
        )
    if dataclasses.is_dataclass(value):
        kinds = [one for one in (hint, *get_args(hint)) if isinstance(one, type)]
        base = next((one.__name__ for one in kinds if isinstance(value, one)), "")
        return type(value).__name__ + f", which is derived from it: write {base}(...)" * bool(base)
    tries: list[Any] = []
    if isinstance(value, list):
        tries = [tuple(value)]
    elif isinstance(value, str):
        tries = [number for kind in (int, float) if (number := _number(kind, value)) is not None]
    elif isinstance(value, float) and value.is_integer():
        tries = [int(value)]
    meant = next((f": write {_shown(one)}" for one in tries if _fits(hint, one)), "")
    return f"{_shown(value)}{meant}"


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return None


def _shown(value: Any) -> str:
    """Return a value as Python writes it when that is short, or else what kind of value it is."""
    text = repr(value)
    return text if len(text) <= 60 and text.isprintable() else shown(value)
