"""Collect what --help prints about a command's options, and what the source says about them."""

import ast
import inspect
import re
import runpy
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from tests.helpers.places import ROOT

# An option's name follows the edge of tyro's frame. Its text is further right, or after two spaces.
_OPTION = re.compile(r"[│ ] (?:-\w, )?(--[a-z].*?)(?:  |│|$)")


def options(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, str]:
    """Return the options that --help lists, each with its text, without spaces."""
    script, *arguments = command.split()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    assert not stop.value.code
    found: dict[str, str] = {}
    names: list[str] = []
    for line in capsys.readouterr().out.splitlines():
        if option := _OPTION.match(line):
            names = re.findall(r"--[\w.-]+", option[1])
            found |= dict.fromkeys(names, "")
        for name in names:
            found[name] += squeeze(line)
    return found


def squeeze(text: str) -> str:
    """Remove spaces and frames, so that wrapped text equals text that was not wrapped."""
    return re.sub(r"[\s│]+", "", text)


def field_texts(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each option's name and docstring, of a dataclass and of the dataclasses in it.

    The docstring is empty where a field has none. Positional arguments are left out.

    Args:
        config: A dataclass or an instance of one.
    """
    kind = config if isinstance(config, type) else type(config)
    texts, hints = _docstrings(kind), get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, *notes = get_args(hints[field.name]) or [hints[field.name]]
        value = hint if config is kind else getattr(config, field.name)
        flat = any(getattr(note, "name", None) == "" for note in notes)
        name = prefix if flat else f"{prefix}{field.name.replace('_', '-')}"
        if is_dataclass(value):
            yield from field_texts(value, name if flat else f"{name}.")
        elif "Positional" not in str(hints[field.name]):
            yield f"--{name}", texts.get(field.name, "")


def _docstrings(kind: type) -> dict[str, str]:
    """Return the docstrings that follow the fields of a class and of its bases."""
    found: dict[str, str] = {}
    for part in reversed(kind.__mro__):
        if is_dataclass(part):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
            assert isinstance(tree, ast.ClassDef)
            for node, after in zip(tree.body, tree.body[1:], strict=False):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    text = after.value if isinstance(after, ast.Expr) else None
                    if isinstance(text, ast.Constant):
                        found[node.target.id] = str(text.value)
    return found


def parameter_texts(function: Callable[..., object]) -> Iterator[tuple[str, str]]:
    """Yield the name and the documentation of each parameter of a function that is an option."""
    entry = r"^    (\w+): (.*(?:\n {8}.*)*)"
    found = dict(re.findall(entry, inspect.getdoc(function) or "", re.MULTILINE))
    for name, parameter in inspect.signature(function).parameters.items():
        if "Positional" not in str(parameter.annotation):
            yield f"--{name.replace('_', '-')}", found.get(name, "")
