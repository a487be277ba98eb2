"""Documents that strangers wrote are checked like recipes, field by field."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval

from shards.documents import Natural, build, parse_json, shown
from shards.errors import InputError
from shards.fields import Range, UnitInterval


@dataclass(frozen=True)
class Inner:
    depth: Literal[18, 50]
    area: Range = (0.1, 1.0)


@dataclass(frozen=True)
class Outer:
    name: str
    count: Natural
    ratio: UnitInterval
    inner: Inner
    size: Annotated[int | None, Interval(ge=8)] = None
    sums: dict[str, tuple[Natural, Natural]] = field(default_factory=dict)


def document(**changes: Any) -> dict[str, Any]:
    whole = {"name": "a", "count": 1, "ratio": 1, "inner": {"depth": 18, "area": [0.5, 1]}}
    return whole | changes


def test_a_sound_document_becomes_typed() -> None:
    found = build(Outer, document(sums={"f": [1, 2]}, size=9, unknown=1))
    assert found == Outer("a", 1, 1.0, Inner(18, (0.5, 1.0)), 9, {"f": (1, 2)})
    assert type(found.ratio) is float


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": ["a"]}, "name must be a text, not a list of 1"),
        ({"name": None}, "name must be a text, not null"),
        ({"count": True}, "count must be a whole number, not true or false (True)"),
        ({"count": 1.0}, "count must be a whole number, not a number (1.0)"),
        ({"count": -1}, "count must be at least 0 and less than 4611686018427387904"),
        (
            {"count": 10**5000},
            "count must be a number of 64 bits, not a number of more than 64 bits",
        ),
        ({"ratio": float("nan")}, "ratio must be from 0 to 1, not nan"),
        ({"ratio": float("inf")}, "ratio must be from 0 to 1, not inf"),
        ({"ratio": 10**400}, "ratio must be a number, not a whole number (a number of more than"),
        ({"inner": []}, "inner must be an object, not a list of 0"),
        ({"inner": {"depth": 7}}, "inner.depth must be one of 18, 50, not 7"),
        ({"inner": {"depth": 18.0}}, "inner.depth must be one of 18, 50, not 18.0"),
        ({"inner": {}}, "inner lacks depth"),
        ({"inner": {"depth": 18, "area": [1, float("nan")]}}, "inner.area must be more than 0"),
        ({"inner": {"depth": 18, "area": [1, 0.5]}}, "inner.area must be two rising numbers"),
        ({"inner": {"depth": 18, "area": [1]}}, "inner.area must be a list of 2, not a list of 1"),
        ({"size": 7}, "size must be at least 8, not 7"),
        ({"size": "9"}, "size must be a whole number or null, not a text ('9')"),
        ({"sums": {"\x1b[2J": [1, -1]}}, "sums['\\x1b[2J'][1] must be at least 0"),
        ({"name": b"x" * 10**6}, "name must be a text, not bytes (b'xxx"),
    ],
)
def test_every_fault_names_its_field(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        build(Outer, document(**changes))
    assert str(caught.value).startswith(text)
    assert len(str(caught.value)) < 200


def test_what_is_no_object() -> None:
    with pytest.raises(InputError, match=r"^the file must be an object, not a text \('a'\)"):
        build(Outer, "a")
    with pytest.raises(InputError, match=r"^the file lacks name"):
        build(Outer, {})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"a": 1, "b": 2, "a": 1}', "it has the key 'a' twice"),
        (b'[{"a": {"b\x1b": 1, "b\x1b": 2}}]', "(Invalid control character|the key)"),
        (b"[" * 40 + b"]" * 40, "nested too deeply"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested too deeply"),
        (b"[" * 10**6, "nested too deeply"),
        (b"1" * 5000, "limit"),
        (b"\xff", "utf-8"),
        (b"", "Expecting value"),
    ],
)
def test_no_json_of_this_project(content: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_json(content)


def test_json_is_parsed() -> None:
    assert parse_json(b'{"a": [1, {"a": null}], "b": 1e400}') == {
        "a": [1, {"a": None}],
        "b": float("inf"),
    }


def test_shown_is_short_and_plain() -> None:
    for value in ("\x1b[2J\n" * 10**5, 10**9000, [1] * 10**6, 1.5, None, b"\n", object()):
        assert len(shown(value)) < 200
        assert shown(value).isprintable()
