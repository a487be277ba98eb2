"""Read what the storage tells of the data and of the run; nothing of it has to be there."""

from typing import NamedTuple

from engine.data import check_batches, check_micro
from engine.explain import plan
from engine.explain.plan import Speed
from engine.log import journal
from engine.recipe import Recipe
from engine.state import checkpoint
from shards import index as indexes
from shards.errors import InputError
from shards.index import Index, Shard
from shards.making import synthetic
from shards.order import Order
from shards.storage import files


class Known(NamedTuple):
    """What the storage tells of the data and the run, and what is missing."""

    train: Index | None
    samples: int | None
    classes: int
    at: int  # step of the newest checkpoint
    speed: Speed | None
    missing: list[str]


def look(recipe: Recipe, processes: int) -> Known:
    """Read the index of data.train, the newest checkpoint's step and the speed in the log."""
    index: Index | None = None
    samples, classes, missing = recipe.explain_images, 0, list[str]()
    if samples is not None:
        missing.append("requests and the online head are left out: no data was looked at")
    else:
        index, samples, classes = _read_data(recipe, missing)
    at, log = 0, []
    try:
        at = max(checkpoint.committed_steps(recipe.run), default=0)
        log = journal.read(recipe.run) if recipe.explain_speed is None else []
    except OSError as error:
        missing.append(f"the run was not read: {error}")
    origin = recipe.checkpoint.resume or recipe.checkpoint.branch
    if origin and not at:
        missing.append(f"steps count from 0, not from where {files.redact(origin)} stands")
    if recipe.schedule.rewarm:
        missing.append("learning rates are without the ramp of schedule.rewarm")
    speed = plan.find_speed(recipe.explain_speed, log, processes)
    if speed is None:
        missing.append(
            "the speed is not known, because the run has no log: give --explain-speed, the images "
            "a second of each process, for dates and rates"
        )
    return Known(index, samples, classes, at, speed, missing)


def _read_data(recipe: Recipe, missing: list[str]) -> tuple[Index | None, int | None, int]:
    """Read the index of data.train; return it, and the number of its images and classes.

    What is not there is added to `missing`.
    """
    try:
        index = indexes.load(recipe.data.train, "data.train")
        return index, index.samples, len(index.classes)
    except InputError as error:
        missing.append(f"not read: {error}")
    if drawn := recipe.data.draw:
        missing.append(f"the run will draw {drawn:,} images there, whose bytes are not known")
        return None, drawn, len(synthetic.CLASSES)
    missing.append(
        "so schedule, dates, requests and online head are left out: with --explain-images N, the "
        "schedule is that of N images"
    )
    return None, None, 0


def check_order(recipe: Recipe, known: Known) -> Order | None:
    """Return the order of data.train, when it is there, and check the batches in any case."""
    streams, batch = recipe.data.streams, recipe.batch.size
    if known.train is not None:
        order = Order(known.train, recipe.seed, streams, batch)
        check_batches(recipe, order)
        return order
    shard = Shard("", known.samples or batch, 0, None, "")  # it stands for what is not there
    order = Order(Index("", [shard]), recipe.seed, streams, batch)
    check_micro(recipe) if known.samples is None else check_batches(recipe, order)
    return None
