"""Open the two sets of images that a run is measured on, and say what can be measured on them."""

import json
from collections.abc import Callable
from typing import NamedTuple

from engine.evaluation.given_sets import GivenSet
from engine.processes.world import World, check_alike
from shards.digest import digest
from shards.errors import InputError
from shards.index import Index
from shards.making.convert import PixelOptions
from shards.matching import check_same_classes, compare_images, compare_windows
from shards.storage import files

_FIELDS = ("probe.train", "probe.val")
_REMEDY = "give --probe.train URL and --probe.val URL, which have labels, to have it"


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
    sets, notes = find_sets(places, train, val, world), []
    found: list[Index | None] = [train, val]
    for i, given in sets.items():
        own = files.join(cache, given.name.partition(".")[2])
        index = given.open(own, lambda: options, threads=threads, report=report, alone=True)
        if doubt := compare_windows(train, index, ("data.train", given.name)):
            notes.append(doubt)
        found[i] = index
    bank, queries, fields = found[0] or train, found[1], _name_fields(sets)
    facts: dict[str, str] = {}
    for name, known in (("data.train", train), (fields[0], bank), (fields[1], queries)):
        if known is not None:
            same = digest(json.dumps(known.classes))
            facts |= {f"digest of {name}": known.digest, f"classes of {name}": same}
    check_alike(world, facts)  # otherwise a process could measure, and wait for one that does not
    if fault := _find_fault(bank, queries, fields):
        notes.append(f"evaluations measure no kNN, because {fault}: {_REMEDY}")
        return ProbeSets(bank, queries or bank, fields, knn=False, head=False, notes=tuple(notes))
    assert queries is not None
    _check_classes(bank, queries, fields)
    if doubt := compare_images(bank, queries, fields):
        notes.append(doubt)
    head = queries.classes == train.classes
    if train.classes and not head:
        notes.append(f"{fields[1]} has other classes than data.train: no online_top1")
    return ProbeSets(bank, queries, fields, knn=True, head=head, notes=tuple(notes))


def find_sets(
    places: tuple[str, str], train: Index, val: Index | None, world: World
) -> dict[int, GivenSet]:
    """Find the sets at the values of probe.train and probe.val that are set; 0 is probe.train.

    No folder is packed, which may take hours. All processes call it together. Raises InputError
    when a set is none, has no labels, or has other classes than the other one.
    """
    sets: dict[int, GivenSet] = {}
    for i, field in enumerate(_FIELDS):
        if places[i]:
            sets[i] = GivenSet(places[i], field, world)
            sets[i].require_labels()
    bank, queries = (sets[i].preview if i in sets else (train, val)[i] for i in (0, 1))
    fields = _name_fields(sets)
    if bank is not None and queries is not None and not _find_fault(bank, queries, fields):
        world.on_all(lambda: _check_classes(bank, queries, fields))
    return sets


def _name_fields(sets: dict[int, GivenSet]) -> tuple[str, str]:
    first, second = (sets[i].name if i in sets else f"data.{('train', 'val')[i]}" for i in (0, 1))
    return first, second


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
        check_same_classes(bank, queries, fields)
    except InputError as error:
        absent = set(_FIELDS) - set(fields)
        more = "".join(f", or give --{field} URL too" for field in absent if len(absent) == 1)
        raise InputError(f"{error}{more}") from None
