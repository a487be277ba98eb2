"""Check for --explain what a start would refuse, as far as that needs no training."""

from engine.beginning import check_ramp
from engine.data import check_val, preview_probe_sets
from engine.log.terminal import Terminal
from engine.processes.world import World
from engine.recipe import Recipe
from engine.run import check_run
from engine.state import layout, origin
from shards import index as indexes
from shards.index import Index
from shards.making import synthetic
from shards.no_index import holds_images
from shards.storage import files


def check_start(recipe: Recipe, world: World, terminal: Terminal) -> None:
    """Check the run directory and the sets of images, and say what a start would say of them.

    Nothing is written, and no image is read. Where data.train is not there, or --explain-images
    stands in for it, sets are not looked at. All processes call it together.

    Raises InputError as the start would.
    """
    if recipe.explain_images:
        return
    train = _look(recipe.data.train, "data.train", recipe.data.draw, world)
    digest = train.digest if train is not None and train.shards else None
    world.on_main(lambda: check_run(recipe, digest, terminal))
    if not (recipe.checkpoint.branch or recipe.checkpoint.resume):  # those may bring a branch
        recorded = world.on_main(lambda: layout.read_recipe(recipe.run))
        check_ramp(recipe, origin.of_fields(recorded))
    if train is None:
        return
    val = None
    if url := recipe.data.val:
        val = _look(url, "data.val", recipe.data.draw // 4, world)
        val = val or world.on_all(lambda: indexes.load(url, "data.val"))  # It raises the error.
    if doubt := check_val(train, val):
        terminal.say(doubt)
    sets = preview_probe_sets(recipe, train, val, world, terminal.say)
    for note in sets.notes if sets is not None else ():
        terminal.say(note)


def _look(url: str, name: str, drawn: int, world: World) -> Index | None:
    """Return a set's index, or one without shards of the images that a start will draw there.

    It is None when there is neither.
    """
    there = files.join(url, indexes.NAME)
    if world.on_main(lambda: files.exists(there) or (drawn > 0 and holds_images(url))):
        return world.on_all(lambda: indexes.load(url, name))
    return Index(url, [], list(synthetic.CLASSES)) if drawn else None
