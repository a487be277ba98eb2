"""Parse command lines to a recipe."""

import difflib

import tyro

from engine.recipe import Recipe, load, operation_names
from launch.help_texts import join_help_lines
from launch.plain_errors import plain_errors
from shards.errors import InputError
from shards.fields import flatten


def parse_recipe(arguments: list[str]) -> Recipe:
    """Parse RECIPE [--field.name value ...] to the complete recipe, and check it.

    Raises InputError with one line for an unknown field or a bad value. --help prints and exits.
    """
    if not arguments or arguments[0].startswith("-"):
        raise InputError(
            "usage: torchrun launch/train.py RECIPE [--field.name value ...]; RECIPE is a file "
            "like recipes/quickstart.py, and RECIPE --help lists its fields"
        )
    base = load(arguments[0])
    description = (
        f"{arguments[0]}: all fields, and the values that this recipe gives them. These fields may "
        f"change at every start of a run: {', '.join(operation_names())}. All others decide what "
        "is computed (method fields), and a run continues only with the same ones."
    )
    join_help_lines(Recipe, arguments)
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
    try:
        recipe.check()
    except TypeError as error:  # nothing else checks the types in a recipe file
        raise InputError(
            f"{arguments[0]}: a field has a value of the wrong type: {error}"
        ) from None
    return recipe


def _unknown(argument: str, recipe: Recipe) -> str:
    name = argument.lstrip("-").split("=")[0]
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}: fields are given as --field.name value"
    names = [known.replace("_", "-") for known in flatten(recipe)]
    near = difflib.get_close_matches(name.replace("_", "-"), names, n=1)
    hint = f"did you mean --{near[0]}?" if near else "--help lists the fields"
    return f"unknown field --{name}: {hint}"
