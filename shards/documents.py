"""Check the JSON that strangers wrote, by the types and bounds of the dataclasses that hold it.

A document is checked like a recipe: its fields are those of a dataclass, their types are hints, and
their bounds are annotations on them (annotated-types). Every fault is an InputError that names the
field, before anything is built or allocated.
"""

import dataclasses
import gc
import json
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Interval

from shards.errors import InputError
from shards.fields import check_annotations

DEEPEST = 32  # levels of lists and objects; no document of this project has ten
LARGEST = 2**63 - 1  # of numpy and torch

_NATURAL = Interval(ge=0, lt=2**62)
Natural = Annotated[int, _NATURAL]
Sum32 = Annotated[int, Interval(ge=0, lt=2**32)]  # a CRC32

_LONGEST = 80  # A message shows at most this many characters of a value.
_WORDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}

_T = TypeVar("_T")
_Check = Callable[[Any, str], Any]  # takes a value and its field's name, returns the value as typed


def parse_json(content: bytes) -> Any:
    """Parse a JSON document.

    Raises ValueError, whose text says why in one line, when it is no JSON, when an object has a key
    twice, and when it is nested more deeply than any document of this project.
    """
    try:
        document = json.loads(content, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(document)
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"it has the key {shown(twice)} twice")
    return found


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(DEEPEST):
        level = [
            below
            for value in level
            if type(value) in (dict, list)
            for below in (value.values() if type(value) is dict else value)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


@contextmanager
def without_gc() -> Iterator[None]:
    """Turn off Python's garbage collector while a large document is read.

    Its search for reference cycles would take most of the time, and there are no cycles.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def build(kind: type[_T], document: object, name: str = "") -> _T:
    """Make the dataclass `kind` of a document, which is an object with a value for each field.

    Fields that have a default may be missing. Keys that are no fields are ignored, because a later
    release may have added them.

    Args:
        name: The name of the document in its file, for messages; "" when it is the whole file.

    Raises InputError, naming the field, when one is missing, of another type or out of bounds.
    """
    return cast(_T, check(kind, document, name))


def check(hint: Any, value: object, name: str) -> Any:
    """Return a value as the type that `hint` says, with lists as tuples where it says so.

    Raises InputError, naming the field `name`, when it is of another type or out of bounds.
    """
    return _checker(hint)(value, name)


def shown(value: object) -> str:
    """Return a short text of one line about a value, for messages."""
    if isinstance(value, dict | list | tuple):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value):,}"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number of more than 64 bits"  # Its digits may be more than Python prints.
    if isinstance(value, str | bytes):
        return ascii(value[:_LONGEST]) + "..." * (len(value) > _LONGEST)
    found = ascii(value)
    return found if len(found) <= _LONGEST else found[:_LONGEST] + "..."


@lru_cache(1024)
def _checker(hint: Any) -> _Check:
    """Return the function that checks the values of a field with this hint."""
    origin, given = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value, _: value
    if given[1:] == (_NATURAL,) and given[0] is int:
        return _check_natural
    if origin is Annotated:
        return partial(_check_bounds, _checker(given[0]), given[1:])
    if origin in (Union, types.UnionType):
        return partial(_check_union, [(_json_types(one), _checker(one)) for one in given])
    if origin is Literal:
        return partial(_check_choice, given)
    if origin in (list, tuple, dict):
        return _container(origin, given)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        entries = [
            (one.name, _checker(hints[one.name]), _is_needed(one))
            for one in dataclasses.fields(hint)
        ]
        return partial(_check_object, hint, entries)
    return partial(_check_type, hint)


def _is_needed(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _container(origin: type, given: tuple[Any, ...]) -> _Check:
    if origin is dict:
        return partial(_check_dict, _checker(given[1]))
    if origin is tuple and given[-1] is not ...:
        return partial(_check_pair, [_checker(one) for one in given])
    return partial(_check_list, origin, _checker(given[0]))


def _json_types(hint: Any) -> tuple[type, ...]:
    """Return the types that the JSON of a value of this hint has."""
    origin, given = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _json_types(given[0])
    if origin is Literal:
        return tuple({type(one) for one in given})
    if origin in (list, tuple):
        return (list, tuple)
    if origin is dict or dataclasses.is_dataclass(hint):
        return (dict,)
    return (int, float) if hint is float else (hint,)


def _wrong(name: str, wanted: str, value: object) -> InputError:
    kind = _WORDS.get(type(value), type(value).__name__)
    text = shown(value) if isinstance(value, dict | list | tuple) else f"{kind} ({shown(value)})"
    text = "null" if value is None else text
    return InputError(f"{name or 'the file'} must be {wanted}, not {text}")


def _check_type(kind: type, value: Any, name: str) -> Any:
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    if type(value) is not kind:
        raise _wrong(name, _WORDS[kind], value)
    if type(value) is int and abs(value) > LARGEST:
        raise InputError(f"{name} must be a number of 64 bits, not {shown(value)}")
    return value


def _check_natural(value: Any, name: str) -> Any:
    """Do what `_check_bounds` would do, in a fifth of its time; large files have millions."""
    if type(value) is int and 0 <= value < 2**62:
        return value
    return _check_bounds(partial(_check_type, int), (_NATURAL,), value, name)


def _check_bounds(inner: _Check, bounds: tuple[Any, ...], value: Any, name: str) -> Any:
    value = inner(value, name)
    if value is not None:
        check_annotations(name, value, bounds)
    return value


def _check_union(members: list[tuple[tuple[type, ...], _Check]], value: Any, name: str) -> Any:
    for kinds, inner in members:
        if type(value) in kinds:
            return inner(value, name)
    wanted = " or ".join(dict.fromkeys(_WORDS[kinds[0]] for kinds, _ in members))
    raise _wrong(name, wanted, value)


def _check_choice(choices: tuple[Any, ...], value: Any, name: str) -> Any:
    # True is no 1, and 1.0 is none either.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        wanted = ", ".join(str(choice) for choice in choices)
        raise InputError(f"{name} must be one of {wanted}, not {shown(value)}")
    return value


def _check_list(kind: type, inner: _Check, value: Any, name: str) -> Any:
    if type(value) not in (list, tuple):
        raise _wrong(name, "a list", value)
    return kind([inner(one, f"{name}[{i}]") for i, one in enumerate(value)])


def _check_pair(inner: list[_Check], value: Any, name: str) -> Any:
    if type(value) not in (list, tuple) or len(value) != len(inner):
        raise _wrong(name, f"a list of {len(inner)}", value)
    return tuple(
        one(entry, f"{name}[{i}]") for i, (one, entry) in enumerate(zip(inner, value, strict=True))
    )


def _check_dict(inner: _Check, value: Any, name: str) -> Any:
    if type(value) is not dict:
        raise _wrong(name, "an object", value)
    return {key: inner(one, f"{name}[{shown(key)}]") for key, one in value.items()}


def _check_object(
    kind: type, entries: list[tuple[str, _Check, bool]], value: Any, name: str
) -> Any:
    if type(value) is not dict:
        raise _wrong(name, "an object", value)
    dot = f"{name}." if name else ""
    found = {}
    for field, inner, needed in entries:
        if field in value:
            found[field] = inner(value[field], dot + field)
        elif needed:
            raise InputError(f"{name or 'the file'} lacks {field}")
    return kind(**found)
