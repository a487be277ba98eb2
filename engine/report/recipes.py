"""Compare recipes: with the defaults, and with each other."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.method.encoders import ENCODERS
from engine.method.lars import LARSConfig
from engine.method.resnet import ResNetConfig
from engine.recipe import ADDED_LATER, Recipe, optimizers
from shards.fields import flatten
from shards.storage import files

LONGEST = 300  # characters of a value that are shown


def defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the default of each field of a recipe, as recipe.json holds values.

    Those of the optimizer and of the encoder are the defaults of the recipe's own kinds of them.
    """
    plain = Recipe()
    kinds = {kind.__name__: kind for kind in optimizers()}
    kind = kinds.get(str(fields.get("optimizer")), LARSConfig)
    encoder = ENCODERS.get(str(fields.get("model.encoder")), ResNetConfig)
    model = replace(plain.model, encoder=encoder())
    found = flatten(replace(plain, optimizer=kind(), model=model))
    found |= {"optimizer": LARSConfig.__name__, "model.encoder": ResNetConfig.__name__}
    return {name: _as_json(value) for name, value in found.items()}


def _as_json(value: Any) -> Any:
    return [_as_json(one) for one in value] if isinstance(value, (tuple, list)) else value


def changed_fields(fields: dict[str, Any]) -> list[tuple[str, str, str]]:
    """List the fields that differ from the defaults, as texts: name, default, value.

    The default is "" where this release does not know the field.
    """
    there = defaults(fields)
    return [
        (name, show(there[name]) if name in there else "", show(value))
        for name, value in sorted(fields.items())
        if name not in there or there[name] != value
    ]


def differing_fields(recipes: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the fields that are not the same in all recipes, each with its value in every recipe.

    The run's own place is left out. A field that a recipe lacks, because it is of an earlier
    release, has the value that it had then. A recipe that is empty, because it could not be read,
    differs in nothing and has "" everywhere.
    """
    filled = [defaults(one) | ADDED_LATER | one if one else {} for one in recipes]
    found: dict[str, list[str]] = {}
    for name in sorted({name for one in filled for name in one} - {"run"}):
        values = [show(one[name]) if name in one else "" for one in filled]
        if len({value for value, one in zip(values, filled, strict=True) if one}) > 1:
            found[name] = values
    return found


def show(value: Any) -> str:
    """Return a value of recipe.json as text of bounded length. 4 and 4.0 are the same."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, list):
        text = ", ".join(_show_plain(one) for one in value)
    else:
        text = files.redact(_show_plain(value))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _show_plain(value: Any) -> str:
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return str(int(value) if is_whole else value)
