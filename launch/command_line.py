"""Parse command lines to a recipe."""

import re
from dataclasses import replace
from typing import Any, NamedTuple

import tyro

from engine.recipe import Recipe, RecipeFile, load_file, operation_names
from engine.state.origin import describe_source
from launch import help_page
from launch.help_texts import join_help_lines
from launch.hints import hint
from launch.plain_errors import plain_errors
from shards import index as indexes
from shards.errors import InputError
from shards.fields import flatten
from shards.storage import files


class Start(NamedTuple):
    """Hold what a command line asks for."""

    recipe: Recipe
    source: dict[str, Any]  # what recipe.json says of the recipe file


def parse_start(arguments: list[str]) -> Start:
    """Parse RECIPE [--field.name value ...] to the complete recipe, and check it.

    What the recipe file says otherwise is kept beside it.

    Raises InputError with one line for an unknown field or a bad value. --help prints and exits.
    """
    help_page.print_when_asked(arguments)
    if not arguments or arguments[0].startswith("-"):
        raise InputError(
            "usage: torchrun launch/train.py RECIPE [--field.name value ...]; RECIPE is a file "
            "like recipes/quickstart.py and comes first, --help lists the recipes that come "
            "along, and RECIPE --help lists the fields"
        )
    found = load_file(arguments[0])
    join_help_lines(Recipe, arguments)
    base = found.recipe
    recipe = _override(base, found, arguments)
    known = recipe.data.train.strip() or (recipe.explain and recipe.explain_images)
    if found.recipe_for is not None and known:
        epochs = recipe.schedule.epochs
        given = None if epochs == found.recipe.schedule.epochs else epochs
        base = found.for_images(_count_images(recipe), given)
        recipe = _override(base, found, arguments)
        if given is not None:  # the function was told the command line's epochs
            file_epochs = found.recipe.schedule.epochs
            base = replace(base, schedule=replace(base.schedule, epochs=file_epochs))
    recipe.check()
    there, here = flatten(base), flatten(recipe)
    said = {name: there[name] for name in there.keys() & here if there[name] != here[name]}
    return Start(recipe, describe_source(found.path, dict(sorted(said.items()))))


def _override(base: Recipe, found: RecipeFile, arguments: list[str]) -> Recipe:
    """Return `base` with the fields that the command line gives."""
    sizes = "some of them follow the number of images in data.train"
    description = (
        f"{arguments[0]}: all fields, and the values that this recipe gives them"
        f"{f' ({sizes})' if found.recipe_for is not None else ''}. These fields may "
        f"change at every start of a run: {', '.join(operation_names())}. All others decide what "
        "is computed (method fields), and a run continues only with the same ones."
    )
    with plain_errors():
        recipe, unknown = tyro.cli(
            Recipe,
            prog=f"train.py {arguments[0]}",
            description=description,
            args=arguments[1:],
            default=base,
            return_unknown_args=True,
            config=(tyro.conf.AvoidSubcommands,),
        )
    if unknown:
        raise InputError(_unknown(unknown[0], recipe))
    return recipe


def _count_images(recipe: Recipe) -> int:
    """Return the number of training images, or that which the first start will draw."""
    if recipe.explain and recipe.explain_images:
        return recipe.explain_images
    url, drawn = recipe.data.train, recipe.data.draw
    files.check(url, "data.train")
    if drawn and not files.exists(files.join(url, indexes.NAME)):
        return drawn
    try:
        return indexes.load(url, "data.train").samples
    except InputError as error:
        if not recipe.explain:
            raise
        stand_in = "with --explain-images N, N images stand in for what is not there"
        raise InputError(f"{error}; {stand_in}") from None


def _unknown(argument: str, recipe: Recipe) -> str:
    name = argument.lstrip("-").split("=")[0]
    if argument.startswith("-"):
        return f"unknown field --{name}: {hint(name, recipe)}"
    text = f"unexpected argument {argument!r}: fields are given as --field.name value"
    if argument.lower() in ("true", "false", "yes", "no", "on", "off", "0", "1"):
        text += ", and what is on or off without one: --group.name or --group.no-name"
    if re.fullmatch("epochs?|steps?", argument, re.IGNORECASE):
        text += f", and a duration is one value, such as '1 {argument}' in quotes or 1{argument}"
    return text
