"""The cookbook maps every option of the two ancestors to a field that exists."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest

from engine.recipe import Recipe
from tests.helpers.places import ROOT

TEXT = (ROOT / "recipes/README.md").read_text()
FROZEN: dict[str, list[str]] = json.loads((ROOT / "tests/golden/ancestors.json").read_text())


class Row(NamedTuple):
    """A row of a table: the options that it maps, the fields here, and what is said about them."""

    options: list[str]
    fields: list[str]
    remark: str


def configs(hint: Any) -> Iterator[Any]:
    """The config classes that a type hint is made of, such as those of a union."""
    if is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from configs(part)


def field_names(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of a config's fields, with those of all members of unions."""
    hints = get_type_hints(kind)
    for entry in fields(kind):
        name = f"{prefix}{entry.name}"
        yield name
        for nested in configs(hints[entry.name]):
            yield from field_names(nested, f"{name}.")


def tables() -> dict[str, list[Row]]:
    """The rows of each ancestor's table, by its title."""
    section = re.split(r"^## ", TEXT, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith("From the ancestors' options\n")]
    found = {}
    for part in text.split("\n### ")[1:]:
        title, _, body = part.partition("\n")
        lines = [line.strip("|").split("|") for line in body.splitlines() if line[:1] == "|"]
        assert [cell.strip() for cell in lines[0]] == [
            "option and default",
            "field here",
            "remark",
        ]
        found[title] = [row(*map(str.strip, cells)) for cells in lines[2:]]
    return found


def row(options: str, here: str, remark: str) -> Row:
    named = re.findall(r"`([^`]+)`", options) or [options]
    names = re.findall(r"`([^`]+)`", here)
    assert bool(names) != (here == "none"), here
    return Row(named, names, remark)


TABLES = tables()


@pytest.mark.parametrize("title", FROZEN)
def test_no_option_is_missing(title: str) -> None:
    assert sorted(name for one in TABLES[title] for name in one.options) == sorted(FROZEN[title])


def test_the_tables_are_those_of_two_ancestors() -> None:
    assert TABLES.keys() == FROZEN.keys()
    assert [len(names) for names in FROZEN.values()] == [53, 44]


def test_the_fields_exist() -> None:
    known = set(field_names(Recipe))
    assert {"optimizer.betas", "optimizer.trust_coefficient", "views.view1.hue"} <= known
    told = {name for rows in TABLES.values() for one in rows for name in one.fields}
    assert told - known == set()
    assert {"schedule.base_lr", "batch.size", "data.decode"} <= told


def test_what_has_no_field_says_why() -> None:
    for rows in TABLES.values():
        for one in rows:
            assert one.fields or len(one.remark) > 8, one
