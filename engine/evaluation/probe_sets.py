"""Open the two sets of images that a run is measured on, and say what can be measured on them."""

import json
from collections.abc import Callable
from typing import NamedTuple

from engine.processes.world import World, check_alike
from shards import index as indexes
from shards.digest import digest
from shards.errors import InputError
from shards.index import Index
from shards.making.convert import PixelOptions
from shards.making.packed_folder import keep_packed
from shards.storage import files


class ProbeSets(NamedTuple):
    """Hold the set that neighbors are searched in, the set that is measured, and their fields."""

    train: Index
    val: Index
    names: tuple[str, str]  # of the fields that gave them, for messages
    knn: bool  # whether both have labels, of the same classes
    head: bool  # whether val has the classes that the online head learns
    notes: tuple[str, ...]  # lines for the user, for when all checks have passed


def open_probe_sets(
    places: tuple[str, str],
    train: Index,
    val: Index | None,
    cache: str,
    world: World,
    *,
    max_pixels: int,
    threads: int,
    report: Callable[[str], None],
) -> ProbeSets:
    """Open the sets at the URLs `places`; where one is empty, take data.train or data.val.

    A folder of images is packed to `cache` first. All processes call it together.

    Args:
        places: The values of probe.train and probe.val.
        train: data.train, whose window of values a folder of images gets too.
        max_pixels: Images of more pixels are not decoded.
        report: Takes lines about the packing, on the first process.

    Raises InputError when a set is none, has no labels, or has other classes than the other one.
    """
    window = train.pixels.get("window")
    options = PixelOptions(max_pixels, None, tuple(window) if window else None)
    found: list[Index | None] = [train, val]
    names, notes = ["data.train", "data.val"], []
    for i, field in enumerate(("probe.train", "probe.val")):
        if place := places[i]:
            own = files.join(cache, field.partition(".")[2])
            index = _open(place, own, field, options, world, threads, report)
            if doubt := indexes.compare_windows(train, index, ("data.train", field)):
                notes.append(doubt)
            names[i], found[i] = field, index
    fields = names[0], names[1]
    bank, queries = found[0] or train, found[1]
    # Otherwise a process could measure, and wait for one that does not.
    for name, known in (("data.train", train), (fields[0], bank), (fields[1], queries)):
        if known is not None:
            same = digest(json.dumps(known.classes))
            check_alike(world, {f"digest of {name}": known.digest, f"classes of {name}": same})
    if fault := _find_fault(bank, queries, fields):
        notes.append(f"evaluations measure no kNN, because {fault}: {_REMEDY}")
        return ProbeSets(bank, queries or bank, fields, knn=False, head=False, notes=tuple(notes))
    assert queries is not None
    _check_classes(bank, queries, fields)
    head = queries.classes == train.classes
    if train.classes and not head:
        notes.append(f"{fields[1]} has other classes than data.train: no online_top1")
    return ProbeSets(bank, queries, fields, knn=True, head=head, notes=tuple(notes))


_REMEDY = "give --probe.train URL and --probe.val URL, which have labels, to have it"


def _open(
    url: str,
    cache: str,
    name: str,
    options: PixelOptions,
    world: World,
    threads: int,
    report: Callable[[str], None],
) -> Index:
    """Open the shards at `url`, or pack the folder of images there to `cache` and open that.

    Raises InputError on all processes when there is neither, and when there are no labels.
    """

    def find() -> str:
        if files.exists(files.join(url, indexes.NAME)):
            return ""
        return keep_packed(url, cache, options, name=name, threads=threads, report=report)

    packed = world.on_main(find)

    def load() -> Index:
        index = indexes.load(packed or url, name)  # machines may have the shards in other places
        if not index.classes:
            raise InputError(
                f"{name} {files.redact(url)}: has no labels: give a set that has, or a folder of "
                "images with one folder for each class"
            )
        return index

    return world.on_all(load)


def _find_fault(bank: Index, queries: Index | None, fields: tuple[str, str]) -> str:
    """Return why no kNN can be measured; "" when it can."""
    if queries is None:
        return "data.val is not set"
    for index, field in zip((bank, queries), fields, strict=True):
        if not index.classes:
            return f"{field} has no labels"
    return ""


def _check_classes(bank: Index, queries: Index, fields: tuple[str, str]) -> None:
    """Raise InputError unless a label means the same class in both sets."""
    try:
        indexes.check_same_classes(bank, queries, fields)
    except InputError as error:
        absent = {"probe.train", "probe.val"} - set(fields)
        more = "".join(f", or give --{field} URL too" for field in absent if len(absent) == 1)
        raise InputError(f"{error}{more}") from None
