"""Look at what an earlier export left in a folder: it is kept if it is of the same weights.

Files of other weights would stand beside a card that does not describe them. So they are refused,
and with `overwrite` they are removed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from engine.encoder.export import FILES
from engine.encoder.hub import CONFIG
from shards.errors import InputError
from shards.storage import files

CARD = "card.json"
_TOLD = ("encoder", "network", "weights", "head", "input")  # the fields of a card that must agree


@dataclass(frozen=True)
class Folder:
    """The folder that an export is written to."""

    url: str
    overwrite: bool = False
    """Remove the export of other weights instead of raising InputError."""


@dataclass(frozen=True)
class Earlier:
    """What an earlier export left."""

    kept: dict[str, Any]  # files of the same weights, as the card describes them
    compared: int  # the images that they were compared on; 0 without such files
    stale: list[str]  # names of what is removed before the first file is written


def name_for_classifier(file: str) -> str:
    """Return the name that a file of an encoder has when it is of a classifier."""
    return file.replace("encoder", "classifier")


def look(
    folder: Folder, card: dict[str, Any], written: set[str], say: Callable[[str], None]
) -> Earlier:
    """Find out what is in the folder.

    Args:
        folder: The folder.
        card: The card of the new export.
        written: The names of the files that will be written.
        say: Is called with a line where the folder may not be looked into.

    Raises InputError when it holds files of other weights, and `overwrite` is not set.
    """
    place = files.redact(folder.url)
    lengths = _measure(folder.url, cache(say))
    there = _read_card(folder.url) if CARD in lengths else None
    if there is not None and not (differences := _differences(there, card)):
        found = there.get("files")
        listed = found if isinstance(found, dict) else {}
        kept = {
            name: entry
            for name, entry in listed.items()
            if isinstance(entry, dict) and name in lengths and entry.get("bytes") == lengths[name]
        }
        strange = sorted(lengths.keys() - {CARD, CONFIG} - kept.keys() - written)
        compared = there.get("compared_on_images")
        if not strange:
            return Earlier(kept, compared if kept and isinstance(compared, int) else 0, [])
        held = f"{', '.join(strange)}, which {CARD} does not describe"
    elif there is not None:
        held = f"the export of other weights ({'; '.join(differences)})"
    elif lengths:
        held = f"{', '.join(sorted(lengths))}, and no {CARD} that tells of which weights"
    else:
        return Earlier({}, 0, [])
    if not folder.overwrite:
        raise InputError(
            f"OUT {place}: holds {held}: choose another OUT, or replace it with --overwrite"
        )
    # The card is the first, so that it never stands beside half of its files.
    return Earlier({}, 0, sorted(lengths, key=lambda name: (name != CARD, name)))


def make_way(folder: Folder, earlier: Earlier, say: Callable[[str], None]) -> None:
    """Remove what is stale, and say so."""
    if not earlier.stale:
        return
    once = cache(say)
    for name in earlier.stale:
        files.discard_or_empty(files.join(folder.url, name), folder.url, once)
    say(f"{files.redact(folder.url)}: replaced what was there: {', '.join(earlier.stale)}")


def _measure(url: str, say: Callable[[str], None]) -> dict[str, int]:
    """Return the lengths of the files that have names of an export's. Emptied ones are left out."""
    names = {CARD, CONFIG, *FILES.values(), *(name_for_classifier(one) for one in FILES.values())}
    lengths = {}
    for name in sorted(names):
        try:
            lengths[name] = files.size(files.join(url, name))
        except FileNotFoundError:
            continue
        except PermissionError:
            say(
                f"{files.redact(url)}: may not be looked into, so what an earlier export left stays"
            )
    return {name: length for name, length in lengths.items() if length}


def _read_card(url: str) -> dict[str, Any] | None:
    """Return the card that is there; None when it is damaged."""
    try:
        found = files.read_json(files.join(url, CARD))
    except (ValueError, FileNotFoundError):
        return None
    return found if isinstance(found, dict) else None


def _differences(there: dict[str, Any], card: dict[str, Any]) -> list[str]:
    """List how the weights and the input of two cards differ.

    Digests say nothing to people. So the step or the URL stands for that of the weights.
    """
    told: list[str] = []
    card = json.loads(json.dumps(card))  # as it is read: tuples are lists
    for name in _TOLD:
        old, new = there.get(name), card.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            keys = sorted({*old, *new} - {"center_crop", "resize_shorter_side"})  # follow from size
            keys = [key for key in keys if old.get(key) != new.get(key)]
            told += [f"{key} {_show(old.get(key))}, not {_show(new.get(key))}" for key in keys]
        elif name == "weights":
            by = next(o for o in ("step", "checkpoint", name) if there.get(o) != card.get(o))
            told.append(f"{by} {_show(there.get(by))}, not {_show(card.get(by))}")
        elif name == "head" and not (old and new):
            told.append("with a head" if old else "without a head")
        else:
            told.append(f"{name} {_show(old)}, not {_show(new)}")
    return told


def _show(value: Any) -> str:
    return "none" if value is None else ascii(value)[:80].strip("'")
