"""Report the mistakes in a command line, which tyro finds, in one line each."""

import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Union, get_args, get_origin

from tyro import _errors  # tyro documents its hook for errors in this module only
from tyro._arguments import ArgumentDefinition

from shards.errors import InputError
from shards.field_types import describe

# How Python, and tyro for a union, end the message about one value.
_ONE_VALUE = re.compile(r"""(?:base 10: |to float: |from \[)('[^']*'|"[^"]*")(?:\]\.\n|$)""")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise InputError where tyro would print a framed message and exit. --help still exits."""
    with _errors.on_parse_error(_raise_one_line):
        try:
            yield
        except ValueError as error:  # a config's own check raises it
            raise InputError(str(error)) from None


def _raise_one_line(event: _errors.ParseErrorEvent) -> None:
    """Raise InputError for the mistakes that our commands allow; tyro prints any other itself."""
    match event:
        case _errors.BadValue(argument=argument) if argument.is_positional():
            raise InputError(f"missing: {_name(argument)}, or an option before it is unknown")
        case _errors.BadValue(argument=argument):
            raise InputError(f"{_takes(argument)}: a value is missing")
        case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
            raise InputError(f"{_name(argument)}: {value!r} is not one of {', '.join(choices)}")
        case _errors.InstantiationFailure(argument=argument, message=message):
            given = _ONE_VALUE.search(message)
            if argument and given and _is_number(argument):
                raise InputError(f"{_takes(argument)}, not {given[1]}")
            if argument and "\n" in message:  # Of a union, tyro tells how each type failed.
                given = re.search(r"from (\[.*?\])\.\n", message)
                message = f"not {given[1]}" if given else message.split("\n", 1)[0]
            raise InputError(f"{_takes(argument)}: {message}" if argument else message)
        case _errors.MissingArgs(missing_arguments=missing):
            names = " and ".join(_name(found.arg) for found in missing)
            raise InputError(f"missing: {names}; --help says what each argument is")
        case _errors.MissingSubcommand(subcommand_spec=commands):
            raise InputError(f"missing: one of {', '.join(commands.parser_from_name)}")
        case _errors.UnrecognizedArgs(tokens=[token, *_]):
            kind = "option" if token.startswith("-") else "argument"
            raise InputError(f"unknown {kind} {token!r}: --help lists what can be given")


def _name(argument: ArgumentDefinition) -> str:
    if argument.is_positional():
        return str(argument.lowered.metavar)
    return argument.lowered.name_or_flags[0]


def _takes(argument: ArgumentDefinition) -> str:
    if argument.is_positional():
        return _name(argument)
    kind = describe(argument.field.type) if _is_number(argument) else argument.lowered.metavar
    return f"{_name(argument)} takes {kind}"


def _is_number(argument: ArgumentDefinition) -> bool:
    """Return whether it takes one number, so that a recipe's message for it fits."""
    hint = argument.field.type
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    union = get_origin(hint) in (Union, types.UnionType)
    return set(get_args(hint) if union else [hint]) <= {int, float, types.NoneType}
