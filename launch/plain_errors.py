"""Report the mistakes in a command line, which tyro finds, in one line each."""

import difflib
import io
import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from typing import Annotated, Any, Union, get_args, get_origin

import tyro
from tyro import _errors  # tyro documents its hook for errors in this module only
from tyro._arguments import ArgumentDefinition

from shards.errors import InputError
from shards.field_types import describe

# How Python, and tyro for a union, end the message about one value.
_ONE_VALUE = re.compile(r"""(?:base 10: |to float: |from \[)('[^']*'|"[^"]*")(?:\]\.\n|$)""")


# At the start of a line of --help, behind a short name and the edge of tyro's frame.
_OPTIONS = re.compile(r"^[│ ]*(?:-\w, )?(--[a-z][\w.-]*(?:, --[a-z][\w.-]*)*)", re.MULTILINE)

Known = Callable[[], Sequence[str]]


@contextmanager
def plain_errors(arguments: Sequence[str] = (), known: Known = tuple) -> Iterator[None]:
    """Raise InputError where tyro would print a framed message and exit. --help still exits.

    Args:
        arguments: The arguments that are parsed in the block.
        known: Returns the options, or the names of commands, that may be meant by others. It is
            called when there is a mistake.
    """
    with _errors.on_parse_error(partial(_raise_one_line, arguments, known)):
        try:
            yield
        except ValueError as error:  # a config's own check raises it
            raise InputError(str(error)) from None


def list_options(command: Any, config: Sequence[Any] = ()) -> list[str]:
    """Return the options of a command, as its --help lists them.

    Args:
        command: What tyro makes the command of.
        config: tyro's markers of it.
    """
    with redirect_stdout(io.StringIO()) as told, suppress(SystemExit):
        tyro.cli(command, args=["--help"], config=tuple(config))
    found = _OPTIONS.findall(told.getvalue())
    return [name for names in found for name in names.split(", ")]


def propose(given: str, known: Sequence[str]) -> str:
    """Return the known name that is meant most likely, as a question; "" when none is near."""
    name = given.partition("=")[0].lower().replace("_", "-")
    names = [one for one in known if one.startswith("--") == name.startswith("--")]
    leaf = name.lstrip("-").rpartition(".")[2]
    near = (
        [one for one in names if one == name]
        or difflib.get_close_matches(name, names, n=1, cutoff=0.75)
        or [one for one in names if re.split(r"\.|^--", one)[-1] == leaf][:1]
        or difflib.get_close_matches(name, names, n=1)
    )
    return f"did you mean {near[0]}?" if near else ""


def _raise_one_line(arguments: Sequence[str], known: Known, event: _errors.ParseErrorEvent) -> None:
    """Raise InputError for the mistakes that our commands allow; tyro prints any other itself."""
    names = known()
    if isinstance(event, _errors.MissingArgs | _errors.BadValue) and names:
        # An unknown option takes no value, so what was meant as its value is in the wrong place.
        options = (one.partition("=")[0] for one in arguments if re.match("--[a-zA-Z]", one))
        for option in options:
            if option.replace("_", "-") not in names:
                raise InputError(_describe_unknown(option, names))
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
            raise InputError(_describe_unknown(token, names))


def _describe_unknown(token: str, names: Sequence[str]) -> str:
    kind = "option" if token.startswith("-") else "argument"
    advice = propose(token, names) or "--help lists what can be given"
    return f"unknown {kind} {token!r}: {advice}"


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
