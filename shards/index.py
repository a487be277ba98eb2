"""Read and write `index.json`, which says what a data set's shards hold.

With it, any sample is found by arithmetic. The index lists each shard's name, samples, bytes and
blocks. A block is about 4 MB of consecutive samples, which one range read fetches. The block lists
of a large data set are in one small file per shard, the sidecar, which is read when the shard is
first needed. The checksums of the block lists are part of the index's digest.
"""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.digest import digest
from shards.errors import InputError
from shards.storage import files, misplaced, names

VERSION = 1
NAME = "index.json"
BLOCK_BYTES = 4 << 20
INLINE_BLOCKS = 50_000  # If the data set has more blocks than this, they go to sidecars.
# A process needs one or two sidecars for each of its streams. This many take 35 MB for shards of
# 1 GB.
KEPT_SIDECARS = 8192

_T = TypeVar("_T")

Blocks = NDArray[np.int64]  # [K, 2] byte offset in the shard, number of samples


@dataclass
class Shard:
    """The index entry of one tar.

    `blocks` is None when the blocks are in a sidecar. `checksum` is the digest of the blocks.
    `crcs` holds the CRC32 of each block. It is None when the CRCs are not known: in data sets that
    others packed, because only their headers were read, and in data sets so large that their
    blocks are in sidecars.
    """

    name: str
    samples: int
    bytes: int
    blocks: Blocks | None
    checksum: str
    crcs: list[int] | None = None


@dataclass
class Index:
    """The index of a data set: its URL, its shards in order and its class names.

    `classes` is empty when the data set has no labels. Samples are numbered in file order across
    all shards; these numbers are the sample ids. `plan` is the digest of the packing that made the
    shards, or "" when others made them.
    """

    url: str
    shards: list[Shard]
    classes: list[str] = field(default_factory=list)
    plan: str = ""

    def __post_init__(self) -> None:
        self.first_ids = np.cumsum([0, *(shard.samples for shard in self.shards)])  # [S + 1]
        # A long run reads every shard. The bound keeps it from holding all lists of a large data
        # set, at 16 bytes per block.
        self._sidecar = lru_cache(KEPT_SIDECARS)(partial(_read_sidecar, self.url, self.shards))

    @property
    def samples(self) -> int:
        return int(self.first_ids[-1])

    @property
    def digest(self) -> str:
        """SHA-256, as 16 hex digits, of everything that decides which bytes a sample id means."""
        facts = [[s.name, s.samples, s.bytes, s.checksum] for s in self.shards]
        text = json.dumps([VERSION, facts, self.classes], separators=(",", ":"))
        return digest(text)

    def shard_url(self, shard: int) -> str:
        return files.join(self.url, self.shards[shard].name)

    def blocks(self, shard: int) -> Blocks:
        """Return the blocks of a shard. Read its sidecar if it has one that is not in memory.

        Raises InputError when the sidecar is missing or does not match the index.
        """
        blocks = self.shards[shard].blocks
        return self._sidecar(shard) if blocks is None else blocks

    def first_id(self, shard: int, block: int) -> int:
        """Return the id of a block's first sample."""
        return int(self.first_ids[shard] + self.blocks(shard)[:block, 1].sum())

    def block_range(self, shard: int, block: int) -> tuple[int, int]:
        """Return the byte range [start, stop) of a block in its shard."""
        offsets = self.blocks(shard)[:, 0]
        last = block + 1 == len(offsets)
        return int(offsets[block]), self.shards[shard].bytes if last else int(offsets[block + 1])

    def save(self) -> None:
        """Write the index, and before it the sidecars if there are more than INLINE_BLOCKS blocks.

        The index is written last, so a data set whose index.json can be read is complete. Raises
        InputError for a shard name that an index may not contain.
        """
        for shard in self.shards:
            names.check_name(shard.name, files.redact(self.url), "rename it")
        inline = sum(len(self.blocks(i)) for i in range(len(self.shards))) <= INLINE_BLOCKS
        if not inline:
            for i, shard in enumerate(self.shards):
                url = files.join(self.url, sidecar(shard.name))
                files.write(url, json.dumps(self.blocks(i).tolist()).encode())
        content = json.dumps(self.document(inline)).encode()
        files.write(files.join(self.url, NAME), content)

    def document(self, inline: bool) -> dict[str, Any]:
        """Return the content of `index.json`, with the block lists if `inline`."""
        entries = []
        for i, shard in enumerate(self.shards):
            entry: dict[str, Any] = {"name": shard.name, "samples": shard.samples}
            entry |= {"bytes": shard.bytes, "checksum": shard.checksum}
            if inline:
                entry["blocks"] = self.blocks(i).tolist()
                if shard.crcs is not None:
                    entry["crcs"] = shard.crcs
            entries.append(entry)
        head = {"version": VERSION, "digest": self.digest, "samples": self.samples}
        return head | {"plan": self.plan, "classes": self.classes, "shards": entries}


_REINDEX = "run `python launch/pack.py --index-only` on the shards again"


def sidecar(shard_name: str) -> str:
    return f"{shard_name}.blocks.json"


def _read_sidecar(url: str, shards: list[Shard], shard: int) -> Blocks:
    place = files.join(url, sidecar(shards[shard].name))
    try:
        blocks = np.array(_json(place), np.int64).reshape(-1, 2)
    except FileNotFoundError:
        raise InputError(f"{files.redact(place)}: missing; {_REINDEX}") from None
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{files.redact(place)}: is damaged; {_REINDEX}") from None
    if checksum(blocks) != shards[shard].checksum:
        raise InputError(f"{files.redact(place)}: does not match {NAME}; {_REINDEX}")
    return blocks


def checksum(blocks: Blocks) -> str:
    return digest(blocks.astype("<i8").tobytes())


def read_document(url: str) -> Any:
    """Read `index.json` without checking its content.

    Raises FileNotFoundError, or InputError when the file is not JSON.
    """
    return _json(files.join(url, NAME))


@contextmanager
def _without_gc() -> Iterator[None]:
    """Turn off Python's garbage collector during the block.

    Its search for reference cycles would take most of the time, and there are no cycles.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_gc()
def load(url: str, field_name: str) -> Index:
    """Read the index of the data set at `url`.

    Raises InputError when there is no index, when it is damaged or empty, and, on a local disk,
    when a shard is missing or does not have the size that the index says.

    Args:
        field_name: Name of the recipe's field that gave the URL, for messages.
    """
    place = f"{field_name} {files.redact(url)}"
    try:
        document = read_document(url)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{place}: no {NAME} there; {_hint(url, field_name)}") from None
    except (InputError, OSError) as error:
        raise InputError(f"{place}: {error}") from None
    try:
        version, digest = document["version"], document["digest"]
        if version != VERSION:
            raise InputError(f"{place}: index version {version}, not {VERSION}; {_REINDEX}")
        shards = [_shard(entry, f"{place}: {NAME}") for entry in document["shards"]]
        index = Index(url, shards, class_names(document), _typed(document["plan"], str))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InputError(f"{place}: {NAME} is damaged; {_REINDEX}") from None
    if index.digest != digest:
        raise InputError(f"{place}: {NAME} does not match its own digest; {_REINDEX}")
    if index.samples == 0:
        raise InputError(f"{place}: the data set is empty")
    if files.is_local(url):
        _check_sizes(index, place)
    return index


def _hint(url: str, field_name: str) -> str:
    """Return what the user may do where there is no index."""
    near = misplaced.find_near(url, NAME)
    wanted = field_name.removeprefix("data.")
    near.sort(key=lambda folder: not misplaced.last_name(folder).startswith(wanted))
    if near:
        return f"there is one in {files.redact(near[0])}: give that folder"
    if any(folder.endswith(".tar") for folder in misplaced.folders_below(url)):
        return f"index the tars there: python launch/pack.py --index-only {files.redact(url)}"
    return "pack images with `python launch/pack.py`, or index existing tars with its --index-only"


def check_same_classes(train: Index, val: Index) -> None:
    """Raise InputError unless a label means the same class in both data sets."""
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes)) or ["their order"]
        raise InputError(
            f"data.val has other classes than data.train ({len(val.classes)} and "
            f"{len(train.classes)}, differing in {odd[0]}): pack both with the same class folders"
        )


def class_names(document: Any) -> list[str]:
    """Return the class names in a document from `read_document`.

    Raises KeyError or TypeError when they are missing or damaged.
    """
    return [_typed(name, str) for name in _typed(document["classes"], list)]


def _typed(value: Any, kind: type[_T]) -> _T:
    """Return a value read from JSON. Raises TypeError unless its type is exactly `kind`."""
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} in place of {kind.__name__}")
    return value


def _shard(entry: dict[str, Any], place: str) -> Shard:
    """Make a Shard from an entry of the index at `place`.

    Raises InputError when the entry's name is not that of a file beside the index, and KeyError,
    TypeError, ValueError or OverflowError when the entry is damaged otherwise.
    """
    name = names.check_name(entry["name"], place, _REINDEX)
    samples, size = _typed(entry["samples"], int), _typed(entry["bytes"], int)
    if not (0 <= samples < 2**62 and 0 <= size < 2**62):
        raise ValueError(name)
    blocks = np.array(entry["blocks"], np.int64).reshape(-1, 2) if "blocks" in entry else None
    found = _typed(entry["checksum"], str)
    if blocks is not None and (checksum(blocks) != found or blocks[:, 1].sum() != samples):
        raise ValueError(name)
    crcs = entry.get("crcs")
    if crcs is not None and (blocks is None or len(crcs) != len(blocks)):
        raise ValueError(name)
    return Shard(name, samples, size, blocks, found, crcs)


def _check_sizes(index: Index, place: str) -> None:
    folder = files.open_filesystem(index.url)[1]
    for shard in index.shards:
        try:
            # fsspec takes six times as long, which is 2 s for 100,000 shards at every start of a
            # rank.
            size = os.stat(f"{folder}/{shard.name}").st_size
        except FileNotFoundError:
            raise InputError(
                f"{place}: shard {shard.name} is missing; restore it, or pack the data set again"
            ) from None
        if size != shard.bytes:
            state = "truncated" if size < shard.bytes else "changed"
            raise InputError(
                f"{place}: shard {shard.name} is {state}: {size} bytes, {NAME} says {shard.bytes}; "
                "restore it, or index the data set again"
            )


def _json(url: str) -> Any:
    try:
        return files.read_json(url)
    except ValueError:
        raise InputError(f"{files.redact(url)}: not valid JSON; {_REINDEX}") from None
