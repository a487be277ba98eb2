"""Find the two sets that a run's encoder is measured on where the command line names none."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Literal

from engine.encoder.source import Source
from engine.evaluation.given_sets import GivenSet
from engine.processes.world import World
from engine.state.layout import PROBE
from shards import index as indexes
from shards.errors import InputError
from shards.index import Index
from shards.making.convert import PixelOptions
from shards.matching import check_same_classes
from shards.storage import files

Name = Literal["data.train", "data.val"]
_PROBES: dict[Name, Literal["probe.train", "probe.val"]] = {
    "data.train": "probe.train",
    "data.val": "probe.val",
}


def open_index(url: str, name: str, world: World) -> Index:
    """Open a data set. All processes call it together, and an error of one is raised on all."""
    if not url:
        raise InputError(
            f"{name} is not set: give --{name} URL, a folder of shards, or of images with one "
            "folder for each class"
        )
    files.check(url, name)
    return world.on_all(lambda: indexes.load(url, name))


def open_sets(
    given: dict[Name, GivenSet],
    source: Source,
    world: World,
    *,
    labels: bool,
    open_given: Callable[[GivenSet], Index],
    report: Callable[[str], None],
) -> tuple[Index, Index]:
    """Return the set to learn from and the set to measure; those of the run where none is given.

    What is given is opened last, because a folder of images is packed then.

    They are the run's data.train and data.val. Where one of these is not set, or has no labels
    although `labels` are needed, the run's probe.train and probe.val take their places. All
    processes call it together.
    """
    urls = {name: source.data_url(name) for name in _PROBES if name not in given}
    probes = {n: _PROBES[n] for n in urls if source.run and source.fields.get(_PROBES[n])}
    found: dict[Name, Index] = {}
    for name in () if probes and not all(urls.values()) else urls:
        found[name] = open_index(urls[name], name, world)
    lacking = [n for n in urls if n not in found or (labels and not found[n].classes)]
    if probes and lacking:
        for name in probes:
            url = world.on_main(partial(_find_probe, source, probes[name]))
            found[name] = open_index(url, name, world)
            report(f"{name} is the run's {probes[name]}: {files.redact(url)}")
        for name in urls.keys() - found.keys():
            found[name] = open_index(urls[name], name, world)
    if labels:
        known = found | {name: one.preview for name, one in given.items()}
        check_classes(known["data.train"], known["data.val"])
    for name, one in given.items():
        found[name] = open_given(one)
    return found["data.train"], found["data.val"]


def is_own(source: Source, train: Index, val: Index, *, labels: bool) -> bool:
    """Return whether two sets are those that a run is measured on, even if they were moved.

    They are data.train and data.val, or where data.val is not set or lacks the labels that are
    needed, probe.train and probe.val. Without either, no set is the run's own.
    """

    def load(name: str, find: Callable[[], str]) -> Index | None:
        if not source.fields.get(name):
            return None
        try:
            return indexes.load(find(), name)
        except (InputError, OSError):
            return Index("", [])  # What is not there any more equals nothing.

    queries = load("data.val", lambda: source.data_url("data.val"))
    trained_on = train.digest == source.data_digest
    if queries is None or (labels and not queries.classes):
        queries = load("probe.val", lambda: _find_probe(source, "probe.val")) or queries
        bank = load("probe.train", lambda: _find_probe(source, "probe.train"))
        trained_on = trained_on if bank is None else train.content == bank.content
    return trained_on and queries is not None and queries.content == val.content


def find_val(source: Source, report: Callable[[str], None]) -> str:
    """Return the URL of the run's data.val, or of its probe.val where that is not set.

    It is "" when the run has neither. Raises InputError when there are no shards of probe.val.
    """
    if url := source.data_url("data.val"):
        return url
    if not source.run or not source.fields.get("probe.val"):
        return ""
    url = _find_probe(source, "probe.val")
    report(f"data.val is the run's probe.val: {files.redact(url)}")
    return url


def _find_probe(source: Source, name: Literal["probe.train", "probe.val"]) -> str:
    """Return the URL of the shards of the run's probe.train or probe.val.

    Those of a plain folder of images were packed into the run.
    """
    part = name.partition(".")[2]
    packed = files.join(source.run, PROBE, part)
    for below in files.list_names(packed):
        if files.exists(files.join(packed, below, indexes.NAME)):
            return files.join(packed, below)
    try:
        url = source.data_url(name)
    except InputError as error:  # the option of an evaluation has another name
        raise InputError(str(error).replace(f"--{name} ", f"--data.{part} ")) from None
    if not files.exists(files.join(url, indexes.NAME)):
        raise InputError(
            f"data.{part}: the run has none that fits, and there are no shards at its {name} "
            f"{files.redact(url)}: give --data.{part} URL, a folder of shards"
        )
    return url


def packing_options(source: Source, given: list[GivenSet], max_pixels: int) -> PixelOptions:
    """Return how a folder's images are converted: with the window of the run's data.train, if any.

    Without one it is that of other shards which were given. The first process calls it.
    """
    pixels = [one.index.pixels for one in given if one.index is not None]
    with suppress(InputError, OSError):  # What is not there has no window.
        if url := source.data_url("data.train"):
            pixels.insert(0, indexes.load(url, "data.train").pixels)
    window = next((found["window"] for found in pixels if found.get("window")), None)
    return PixelOptions(max_pixels, None, tuple(window) if window else None)


def check_classes(train: Index, val: Index) -> None:
    """Raise InputError unless both data sets have labels and the same classes."""
    for name, index in (("data.train", train), ("data.val", val)):
        if not index.classes:
            raise InputError(
                f"{name} {files.redact(index.url)}: has no labels, which an evaluation needs: "
                "pack the images in one folder for each class"
            )
    check_same_classes(train, val)
