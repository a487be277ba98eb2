"""The cookbook's table of the classes that configure a recipe, beside the recipe itself."""

import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, get_args, get_type_hints

import engine
from engine.recipe import Recipe
from tests.helpers.places import RECIPES


def list_groups(kind: type[Any], before: str = "") -> set[tuple[str, str, str]]:
    """List the groups of fields below a class, each with its class and that one's module."""
    found, hints = set(), get_type_hints(kind)
    for entry in fields(kind):
        for one in get_args(hints[entry.name]) or (hints[entry.name],):
            if is_dataclass(one) and isinstance(one, type):
                name = before + entry.name
                found |= {(name, one.__name__, one.__module__)} | list_groups(one, f"{name}.")
    return found


def read_rows() -> list[list[str]]:
    text = (RECIPES / "README.md").read_text()
    (table,) = re.findall(r"\n\| group \| class \| .*\n\|[-|]+\n((?:\|.*\n)+)", text)
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.split("\n")]


def test_the_cookbook_lists_the_classes_of_all_groups() -> None:
    rows = [row for row in read_rows() if len(row) > 1]
    named = {(g.strip(" `"), *row[1:3]) for row in rows for g in row[0].split(",")}
    assert named == list_groups(Recipe)
    for _, name, module, line in rows:
        scope: dict[str, Any] = {}
        exec(line, scope)
        assert scope[name] is getattr(import_module(module), name), line
        assert line == f"from engine import {name}"
        assert name in dir(engine)
