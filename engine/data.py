"""Open the data of a run and check it against the recipe before anything expensive starts."""

from collections.abc import Callable
from typing import NamedTuple

from engine.evaluation.given_sets import find_images
from engine.evaluation.probe_sets import ProbeSets, find_sets, judge_sets, open_probe_sets
from engine.processes.alike import describe_software
from engine.processes.world import World, check_alike, waiting_for_hours
from engine.recipe import Recipe, shared_fields
from engine.state import layout
from shards import index as indexes
from shards.device_crops import check_device
from shards.errors import InputError
from shards.index import Index
from shards.loader import Assignment
from shards.loader_process import Loader, open_loader
from shards.making import synthetic
from shards.matching import check_same_classes, compare_windows
from shards.no_index import holds_images
from shards.order import Order, rank_streams
from shards.storage import files


class Data(NamedTuple):
    """Hold the training set, the validation set and the order of the training samples."""

    train: Index
    val: Index | None
    order: Order


def open_data(recipe: Recipe, world: World, report: Callable[[str], None]) -> Data:
    """Draw the synthetic images that the recipe asks for, then read the indexes of the data.

    All processes call it together.

    Raises InputError when the processes differ in recipe, code or data, when the data does not fit
    the recipe, when there are more processes than streams, and when there is no GPU to decode on.
    """
    check_alike(world, shared_fields(recipe) | describe_software())
    if recipe.data.decode == "gpu":
        world.on_all(lambda: check_device(world.device))
    rank_streams(recipe.data.streams, world.rank, world.size)
    if recipe.replay is None:  # other images than the run's would be of no use
        with waiting_for_hours():
            world.on_main(lambda: _draw(recipe, report))
    train, val = world.on_all(lambda: _load(recipe))
    data = Data(train, val, Order(train, recipe.seed, recipe.data.streams, recipe.batch.size))
    check_batches(recipe, data.order)
    if (doubt := check_val(train, val)) and world.main:
        report(doubt)
    check_alike(world, {"digest of data.train": train.digest})
    return data


def check_val(train: Index, val: Index | None) -> str:
    """Return a warning when data.val was packed otherwise than data.train; "" when it was not.

    Raises InputError when both have labels, of other classes.
    """
    if val is None:
        return ""
    if train.classes and val.classes:
        check_same_classes(train, val)
    return compare_windows(train, val) if train.shards and val.shards else ""


def _load(recipe: Recipe) -> tuple[Index, Index | None]:
    train = indexes.load(recipe.data.train, "data.train")
    return train, indexes.load(recipe.data.val, "data.val") if recipe.data.val else None


def open_own_probe_sets(
    recipe: Recipe, data: Data, world: World, threads: int, report: Callable[[str], None]
) -> ProbeSets | None:
    """Open the sets that the run is measured on; return None when it is never measured.

    All processes call it together. A folder of images is packed into RUN, which this job holds.
    With `debug_step` nobody holds RUN, and it is packed to where everything is removed again.

    Raises InputError when a set does not fit the other one, and when a figure that ranks
    checkpoints or ends the training cannot be measured.
    """
    probe, home = recipe.probe, recipe.run
    if not _is_measured(recipe, data.train, report):
        return None
    if recipe.debug_step:
        home = files.join(home, layout.DEBUG_STEP)
    sets = open_probe_sets(
        (probe.train, probe.val),
        data.train,
        data.val,
        files.join(home, layout.PROBE),
        world,
        max_pixels=recipe.data.max_pixels,
        threads=threads,
        report=report,
    )
    _check_figures(recipe, sets)
    return sets


def preview_probe_sets(
    recipe: Recipe, train: Index, val: Index | None, world: World, report: Callable[[str], None]
) -> ProbeSets | None:
    """Return what `open_own_probe_sets` would, without packing anything, and raise as it would.

    The sets of folders have their classes and no shards. All processes call it together.
    """
    if not _is_measured(recipe, train, report):
        return None
    places = recipe.probe.train, recipe.probe.val
    sets = judge_sets(find_sets(places, train, val, world), train, val)
    _check_figures(recipe, sets)
    return sets


def _is_measured(recipe: Recipe, train: Index, report: Callable[[str], None]) -> bool:
    """Return whether the run has evaluations, and say so where something depends on them."""
    if recipe.early_stop.key == "head_loss" and not train.classes:
        raise InputError(
            "early_stop.key head_loss cannot be measured, because data.train has no labels: choose "
            "another figure"
        )
    if not recipe.probe.every and recipe.probe.baseline:
        report("probe.baseline is not measured: probe.every is 0, so no evaluation follows")
    return bool(recipe.probe.every)


def _check_figures(recipe: Recipe, sets: ProbeSets) -> None:
    for name, key in recipe.figures().items():
        if not {"knn_top1": sets.knn, "online_top1": sets.head}.get(key, True):
            why = f" ({'; '.join(sets.notes)})" if sets.notes else ""
            raise InputError(
                f"{name} {key} cannot be measured on {sets.names[1]}{why}: choose another figure, "
                "or other sets with --probe.train and --probe.val"
            )


def train_batches(
    recipe: Recipe,
    order: Order,
    world: World,
    *,
    start: int,
    threads: int,
    report: Callable[[str], None],
) -> Loader:
    """Load this process's rows of every batch from step `start` on."""
    streams = rank_streams(recipe.data.streams, world.rank, world.size)
    micro = recipe.batch.micro
    assignment = Assignment(order, streams, recipe.views, recipe.data, threads, micro, start)
    return open_loader(assignment, world.device, report)


def _draw(recipe: Recipe, report: Callable[[str], None]) -> None:
    """Draw the sets that the recipe asks for and that are not there.

    Raises InputError, before anything is drawn, when another URL of the recipe leads nowhere.
    """
    data, size = recipe.data, recipe.views.size
    missing = [
        (name, url, samples, seed)
        for name, url, samples, seed in (
            ("data.train", data.train, data.draw, 0),
            ("data.val", data.val, data.draw // 4, 1),
        )
        if url and samples and not files.exists(files.join(url, indexes.NAME))
    ]
    for name, url, _, _ in missing[:1]:
        _check_others(recipe, name, url)
    for name, url, _, _ in missing:
        files.check_folder(url, name)
        if holds_images(url):  # Somebody's own images are not to be mixed with drawn ones.
            indexes.load(url, name)  # It raises the error.
    for _, url, samples, seed in missing:
        if files.exists(files.join(url, indexes.NAME)):
            continue  # data.val is data.train, whose images have just been drawn
        report(f"drawing {samples} images to {files.redact(url)}")
        synthetic.write(url, samples, size, seed)


def _check_others(recipe: Recipe, name: str, url: str) -> None:
    """Raise InputError when no images may be drawn to the `url` of the field `name`."""
    for probe, place in (("probe.train", recipe.probe.train), ("probe.val", recipe.probe.val)):
        index = files.join(place, indexes.NAME)
        if recipe.probe.every and place and not files.exists(index):
            find_images(place, probe)  # It raises the error that its opening would raise.
    for other, place in (("data.train", recipe.data.train), ("data.val", recipe.data.val)):
        if other == name or not place or not files.exists(files.join(place, indexes.NAME)):
            continue
        # Beside somebody's own images, a URL with nothing there is a mistake.
        if tuple(indexes.load(place, other).classes) != synthetic.CLASSES:
            raise InputError(
                f"{name} {files.redact(url)}: no {indexes.NAME} there, and nothing is drawn there, "
                f"because {other} has other images than drawn ones: give another --{name} URL"
            )


def check_batches(recipe: Recipe, order: Order) -> None:
    """Raise InputError when batches cannot be cut as the recipe says, or none is trained."""
    check_micro(recipe)
    samples, schedule = order.index.samples, recipe.schedule
    total = schedule.total_steps(samples, recipe.batch.size)
    if total < 1:
        raise InputError(
            f"schedule.epochs {schedule.epochs} of {samples} samples are less than one "
            f"step of batch.size {recipe.batch.size}: train for longer"
        )
    warmup = schedule.warmup_steps(samples, recipe.batch.size)
    if warmup > total:
        raise InputError(
            f"schedule.warmup {schedule.warmup} is {warmup} steps, but the whole run has "
            f"{total}: give a shorter --schedule.warmup"
        )


def check_micro(recipe: Recipe) -> None:
    """Raise InputError when the rows of a stream cannot be cut into the micro-batches."""
    micro, batch, streams = recipe.batch.micro, recipe.batch.size, recipe.data.streams
    if batch // streams % micro:
        fitting = [n for n in range(1, streams) if batch % (n * micro) == 0]
        raise InputError(
            f"batch.micro {micro} does not divide the {batch // streams} rows that each of "
            f"data.streams {streams} gives to a batch: use "
            + (
                f"--data.streams {fitting[-1]}"
                if fitting
                else f"a --batch.micro that divides batch.size {batch}"
            )
        )
