"""Show the docstrings of options in --help as running text.

By itself tyro keeps their line breaks, because the lines after the first are indented.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import get_args, get_type_hints


def join_help_lines(program: type | Callable[..., object], arguments: list[str]) -> None:
    """Join the lines of what --help says about each option of a program.

    Nothing is done unless the arguments ask for help, because reading the source takes a while.

    Args:
        program: A config class, whose fields and theirs are options, or a function, whose
            parameters are.
    """
    if not {"-h", "--help"} & set(arguments):
        return
    if isinstance(program, type):
        _join(program)
    else:  # In its docstring, only what follows the first line of a parameter is indented so far.
        text = re.sub(r"\n {8,}", " ", inspect.getdoc(program) or "")
        # Of running text, tyro joins only lines that begin with a letter.
        program.__doc__ = re.sub(r"(?<=\S)\n(?=[^\s*-])", " ", text)


def _join(kind: type) -> None:
    texts, hints = _docstrings(kind), get_type_hints(kind)
    for field in fields(kind):
        if text := texts.get(field.name):  # tyro takes a help of the metadata as it is
            field.metadata = MappingProxyType({**field.metadata, "help": text})
        for nested in (hints[field.name], *get_args(hints[field.name])):
            if isinstance(nested, type) and is_dataclass(nested):
                _join(nested)


def _docstrings(kind: type) -> dict[str, str]:
    """Return the docstrings, each in one line, that follow the fields of a class and its bases."""
    found: dict[str, str] = {}
    for part in filter(is_dataclass, reversed(kind.__mro__)):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in pairwise(tree.body):
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Constant):
                found[ast.unparse(node.target)] = " ".join(str(text.value).split())
    return found
