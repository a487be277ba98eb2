"""Types of the values in a config that somebody wrote in Python."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval

from engine import recipe_files
from engine.recipe import Recipe, load
from engine.recipe import _configs as configs
from shards.errors import InputError
from shards.field_types import check_types
from shards.fields import Operation, Range


@dataclass(frozen=True)
class Inner:
    number: Annotated[int, Interval(ge=0)] = 3
    rate: float = 0.5


@dataclass(frozen=True)
class Other:
    on: bool = True


@dataclass(frozen=True)
class Derived(Inner):
    """What a run's recipe.json and the command line could not describe."""


@dataclass(frozen=True)
class Config:
    text: Operation[str] = ""
    some: Operation[Annotated[int | None, Interval(ge=1)]] = None
    kind: Literal["a", "b"] = "a"
    pair: Range = (0.1, 2.0)
    many: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)
    either: Inner | Other = field(default_factory=Inner)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"some": 3, "kind": "b", "pair": (1, 2), "many": ("a",), "either": Other()},
        {"inner": Inner(rate=1), "text": "x"},
    ],
)
def test_right_types_pass(given: dict[str, Any]) -> None:
    check_types(Config(**given))


def wrong(kind: Any, **values: Any) -> Any:
    """A config with values that mypy would refuse."""
    return kind(**values)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"text": None}, "text takes a text, not None"),
        ({"text": b"x"}, "text takes a text, not b'x'"),
        ({"some": "3"}, "some takes a whole number or None, not '3': write 3"),
        ({"some": 3.0}, "some takes a whole number or None, not 3.0: write 3"),
        ({"some": True}, "some takes a whole number or None, not True"),
        ({"kind": "c"}, "kind takes one of a, b, not 'c'"),
        ({"pair": [0.1, 2]}, "pair takes a tuple of 2 values, each a number, not [0.1, 2]: write"),
        ({"pair": (1, 2, 3)}, "pair takes a tuple of 2 values, each a number, not (1, 2, 3)"),
        ({"pair": 3}, "pair takes a tuple of 2 values, each a number, not 3"),
        ({"many": "ab"}, "many takes a tuple of values, each a text, not 'ab'"),
        ({"inner": 256}, "inner takes an Inner, not 256"),
        ({"inner": Other()}, "inner takes an Inner, not Other"),
        (
            {"inner": Derived()},
            "inner takes an Inner, not Derived, which is derived from it: write ",
        ),
        (
            {"either": Derived()},
            "either takes an Inner or an Other, not Derived, which is derived from it: write ",
        ),
        ({"inner": Inner}, "inner takes an Inner, not the class Inner: write Inner()"),
        (
            {"inner": wrong(Inner, number="256")},
            "inner.number takes a whole number, not '256': write 256",
        ),
        ({"inner": wrong(Inner, rate=None)}, "inner.rate takes a number, not None"),
        ({"either": wrong(Other, on=1)}, "either.on takes True or False, not 1"),
        ({"either": 1}, "either takes an Inner or an Other, not 1"),
        ({"text": ["x" * 1000]}, "text takes a text, not a list of 1"),
    ],
)
def test_a_wrong_type_names_its_field(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as error:
        check_types(Config(**given))
    assert str(error.value).startswith(text)
    assert len(str(error.value)) < 200


def test_every_recipe_has_the_right_types() -> None:
    for path in recipe_files.shipped().values():
        check_types(load(str(path)))
    assert {"ViewConfig", "AdamWConfig", "LARSConfig"} <= {
        kind.__name__ for kind in configs(Recipe)
    }
