"""Make the recipe that a run has from its recipe.json, without the file that it came from."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from engine import recipe_files
from engine.recipe import Recipe, in_todays_terms, load, method_fields
from engine.state import layout, origin
from shards.documents import check, shown
from shards.errors import InputError
from shards.field_types import check_types
from shards.storage import files, names

_PLACES = ("data.train", "data.val", "probe.train", "probe.val")


def load_recipe(source: str | Path) -> Recipe:
    """Load the recipe of a recipe file, of a shipped one by its bare name, or of a run by its URL.

    A run's is that of its last start, with all fields that the command line gave, and its `run` is
    the URL given here, where the run may have been moved to. RUN/recipe.json names the run too.

    Raises InputError when there is no such file or run, and when its recipe is at fault.
    """
    url = str(source) if isinstance(source, str | Path) else ""
    remote = "://" in url and not url.endswith(".py")
    if url in recipe_files.shipped() or not (_names_recipe(url) or remote or _is_folder(url)):
        return load(source)
    return read_recipe(url.removesuffix(layout.RECIPE).rstrip("/") or ".")


def read_recipe(run: str) -> Recipe:
    """Return the recipe of the last start in the run directory at this URL.

    What was secret in the URLs of its fields is not there. Raises InputError when no run is there,
    and when its recipe.json is damaged or of a later release.
    """
    files.check(run, "run")
    layout.check_run(run)
    place = files.redact(files.join(run, layout.RECIPE))
    if not files.exists(files.join(run, layout.RECIPE)):
        raise InputError(f"{place}: no such file: give a recipe file, or the URL of a run")
    there = layout.read_recipe(run)
    try:
        return _build(there, run, place)
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(place) else f"{place}: {text}") from None


def _names_recipe(url: str) -> bool:
    return url == layout.RECIPE or url.endswith(f"/{layout.RECIPE}")


def _is_folder(url: str) -> bool:
    return bool(url) and files.is_local(url) and Path(files.local_path(url)).is_dir()


def _build(there: dict[str, Any], run: str, place: str) -> Recipe:
    if not there:
        raise InputError("is damaged: take the recipe file that the run was started with")
    given = in_todays_terms({name: there[name] for name in there.keys() - origin.FACTS})
    used: set[str] = set()
    recipe: Recipe = _build_config(Recipe, given, "", used)
    for names_found, what in (
        (given.keys() - used, "has fields that this version does not know"),
        (method_fields(recipe).keys() - given.keys(), "lacks fields"),
    ):
        if names_found:
            listed = ", ".join(shown(name) for name in sorted(names_found)[:5])
            raise InputError(f"{what} ({listed}): use the version of this engine that wrote it")
    for name in _PLACES:
        if name in given:
            names.check_url(given[name], name, place, "take the recipe file of the run")
    recipe = replace(recipe, run=run)
    check_types(recipe)
    return recipe


def _build_config(kind: type[Any], given: dict[str, Any], prefix: str, used: set[str]) -> Any:
    """Build a config of the values `given` by dotted name, and add to `used` what it takes.

    Fields that are missing have their defaults.
    """
    hints = get_type_hints(kind, include_extras=True)
    found: dict[str, Any] = {}
    for entry in fields(kind):
        name, hint = prefix + entry.name, hints[entry.name]
        inner = _find_config(hint, name, given)
        if inner is not None:
            used.add(name)
            found[entry.name] = _build_config(inner, given, f"{name}.", used)
        elif name in given:
            used.add(name)
            found[entry.name] = check(hint, given[name], name)
    return kind(**found)


def _find_config(hint: Any, name: str, given: dict[str, Any]) -> type[Any] | None:
    """Return the config class of a field, which its value names where there are several."""
    if is_dataclass(hint) and isinstance(hint, type):
        return hint
    nested = [one for one in get_args(hint) if isinstance(one, type) and is_dataclass(one)]
    kinds: dict[str, type[Any]] = {one.__name__: one for one in nested}
    if not kinds:
        return None
    named = given.get(name, next(iter(kinds)))
    if not isinstance(named, str) or named not in kinds:
        raise InputError(f"{name} must be one of {', '.join(kinds)}, not {shown(named)}")
    return kinds[named]
