"""Check that a run has the step that --replay names, before its data is opened."""

from engine.continuation import check_recipe
from engine.log.terminal import Terminal
from engine.processes.world import World
from engine.recipe import Recipe
from engine.state import layout, origin
from shards.errors import InputError
from shards.storage import files


def check_replay(recipe: Recipe, step: int, world: World, terminal: Terminal) -> None:
    """Compare the recipe with that of the run, and `step` with the run's beginning.

    All processes call it together. Raises InputError when there is no run, when it is of another
    recipe, and when the step is one of the run that it branched from.
    """

    def check() -> None:
        place = files.redact(recipe.run)
        fields = layout.read_recipe(recipe.run)
        if not fields:
            raise InputError(
                f"replay {step}: there is no run at {place}: give the run's own command, with its "
                "--run-url, and --replay"
            )
        check_recipe(recipe, None, terminal.report)
        point = origin.of_fields(fields).branched_from
        if point is not None and step <= point.step_here:
            raise InputError(
                f"replay {step}: run {place} began at step {point.step_here} of another run "
                f"({point.url}): give a later step, or replay it there"
            )

    world.on_main(check)
