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
    judged = judge_sets(sets, train, val)
    bank, queries, fields = found[0] or train, found[1], judged.names
    facts: dict[str, str] = {}
    for name, known in (("data.train", train), (fields[0], bank), (fields[1], queries)):
        if known is not None:
            same = digest(json.dumps(known.classes))
            facts |= {f"digest of {name}": known.digest, f"classes of {name}": same}
    check_alike(world, facts)  # otherwise a process could measure, and wait for one that does not
    notes += judged.notes
    if judged.knn and queries and (doubt := compare_images(bank, queries, fields)):
        notes.append(doubt)
    return judged._replace(train=bank, val=queries or bank, notes=tuple(notes))


def judge_sets(sets: dict[int, GivenSet], train: Index, val: Index | None) -> ProbeSets:
    """Return what can be measured on the sets that `find_sets` found, before any is packed.

    Raises InputError when they have labels, of other classes.
    """
    bank, queries = (sets[i].preview if i in sets else (train, val)[i] for i in (0, 1))
    bank, fields = bank or train, _name_fields(sets)
    if fault := _find_fault(bank, queries, fields):
        note = f"evaluations measure no kNN, because {fault}"
        return ProbeSets(bank, queries or bank, fields, knn=False, head=False, notes=(note,))
    assert queries is not None
    _check_classes(bank, queries, fields)
    head = queries.classes == train.classes
    other = f"{fields[1]} has other classes than data.train: no online_top1"
    notes = (other,) * bool(train.classes and not head)
    return ProbeSets(bank, queries, fields, knn=True, head=head, notes=notes)


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
    """Return why no kNN can be measured, and what to give; "" when it can be."""
    lacking = [
        (f"data.{probe.partition('.')[2]}", probe)
        for index, field, probe in zip((bank, queries), fields, _FIELDS, strict=True)
        if field not in _FIELDS and (index is None or not index.classes)
    ]
    if not lacking:
        return ""
    first = "data.val is not set" if queries is None else f"{lacking[0][0]} has no labels"
    options = " and ".join(f"--{probe} URL" for _, probe in lacking)
    have = "which have" if len(lacking) > 1 else "which has"
    return f"{first}: give {options}, {have} labels, to have it"


def _check_classes(bank: Index, queries: Index, fields: tuple[str, str]) -> None:
    """Raise InputError unless a label means the same class in both sets."""
    try:
        check_same_classes(bank, queries, fields)
    except InputError as error:
        absent = set(_FIELDS) - set(fields)
        more = "".join(f", or give --{field} URL too" for field in absent if len(absent) == 1)
        raise InputError(f"{error}{more}") from None
