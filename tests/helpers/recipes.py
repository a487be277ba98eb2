"""Parse recipes as launch/train.py does, and list the fields that recipes can have."""

from engine.method.byol import BYOLConfig
from engine.method.torchvision_encoder import TorchvisionConfig
from engine.recipe import Recipe, optimizers
from launch.command_line import parse_start
from shards.fields import flatten


def parse_recipe(arguments: list[str]) -> Recipe:
    """Parse RECIPE [--field.name value ...] to the complete recipe."""
    return parse_start(arguments).recipe


def fields_of_all_recipes() -> set[str]:
    """Return the options of the fields that a recipe can have, without dashes."""
    other = BYOLConfig(encoder=TorchvisionConfig())
    recipes = [Recipe(model=other), *(Recipe(optimizer=kind()) for kind in optimizers())]
    return {name.replace("_", "-") for recipe in recipes for name in flatten(recipe)} | {"run-url"}
