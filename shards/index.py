"""Read and write `index.json`, which says what a data set's shards hold.

With it, any sample is found by arithmetic. The index lists each shard's name, samples, bytes and
blocks. A block is about 4 MB of consecutive samples, which one range read fetches. The block lists
of a large data set are in one small file per shard, the sidecar, which is read when the shard is
first needed. The checksums of the block lists are part of the index's digest.
"""

import json
import os
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache, partial
from typing import Annotated, Any

import numpy as np
from annotated_types import MaxLen
from numpy.typing import NDArray

from shards.blocks import Blocks, check_blocks, checksum
from shards.digest import digest
from shards.documents import Natural, Sum32, build, shown, without_gc
from shards.errors import InputError
from shards.no_index import say_what_to_do
from shards.samples import Layout
from shards.storage import files, names
from shards.tar import BLOCK
from shards.threads import run_in_threads

VERSION = 1
NAME = "index.json"
BLOCK_BYTES = 4 << 20
MOST_CLASSES = 1 << 20  # A linear head has a row for each class.
INLINE_BLOCKS = 50_000  # If the data set has more blocks than this, they go to sidecars.
# A process needs one or two sidecars for each of its streams. This many take 35 MB for shards of
# 1 GB.
KEPT_SIDECARS = 8192
READERS = 16  # This many sidecars are read at once where all are needed.


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
    shards, or "" when others made them. `layout` says how the members of the shards make samples.
    `base` is the folder of the shards, or "" when they lie beside the index. `pixels` are the
    options by which that packing converted images, such as the window of values; it is empty where
    it had none. `stored_digest` is the digest in an index of the first release, which covers the
    names of the classes.
    """

    url: str
    shards: list[Shard]
    classes: list[str] = field(default_factory=list)
    plan: str = ""
    layout: Layout = field(default_factory=Layout)
    base: str = ""
    pixels: dict[str, Any] = field(default_factory=dict)
    stored_digest: str = ""

    def __post_init__(self) -> None:
        self.first_ids = np.cumsum([0, *(shard.samples for shard in self.shards)])  # [S + 1]
        # A long run reads every shard. The bound keeps it from holding all lists of a large data
        # set, at 16 bytes per block.
        self._sidecar = lru_cache(KEPT_SIDECARS)(partial(_read_sidecar, self.url, self.shards))

    def __reduce__(self) -> tuple[Any, ...]:
        """Send to another process what the index was made of, without the sidecars it has read."""
        return Index, tuple(getattr(self, entry.name) for entry in fields(self))

    @property
    def samples(self) -> int:
        return int(self.first_ids[-1])

    @property
    def digest(self) -> str:
        """SHA-256, as 16 hex digits, of everything that decides what a sample id means.

        The number of the classes belongs to that, but their names do so only if labels are names.
        """
        if self.stored_digest:
            return self.stored_digest
        names = self.classes if self.layout.named else map(str, range(len(self.classes)))
        return self.compute_digest(list(names))

    def compute_digest(self, classes: list[str]) -> str:
        """Return the digest that the index has if these names belong to it."""
        facts = [[s.name, s.samples, s.bytes, s.checksum] for s in self.shards]
        # Two windows of values can make shards of the same sizes.
        options = [given for given in (self.layout.document(), self.pixels) if given]
        whole = [VERSION, facts, classes, *options]
        return digest(json.dumps(whole, separators=(",", ":"), sort_keys=True))

    @property
    def content(self) -> str:
        """A digest of the samples' bytes too, as far as the index has the CRCs of its blocks.

        Sets of the same number of images and the same sizes share a `digest`, even where labels
        or pixels differ. What was measured on one of them must not be taken for the other's.
        """
        crcs = [shard.crcs for shard in self.shards]
        return digest(json.dumps([self.digest, crcs])) if any(crcs) else self.digest

    @cached_property
    def class_numbers(self) -> dict[str, int]:
        """The index of each class name, for labels that are names."""
        return {name: i for i, name in enumerate(self.classes)}

    @property
    def folder(self) -> str:
        """The URL of the folder that holds the shards."""
        return self.base or self.url

    def shard_url(self, shard: int) -> str:
        return files.join(self.folder, self.shards[shard].name)

    def blocks(self, shard: int) -> Blocks:
        """Return the blocks of a shard. Read its sidecar if it has one that is not in memory.

        Raises InputError when the sidecar is missing, cannot be read, or does not match the index.
        """
        blocks = self.shards[shard].blocks
        return self._sidecar(shard) if blocks is None else blocks

    @cached_property
    def block_counts(self) -> NDArray[np.int64]:
        """The number of blocks of each shard, [S]. The first use reads the sidecars, if any."""
        shards = range(len(self.shards))
        counts = run_in_threads(lambda shard: len(self.blocks(shard)), shards, READERS)
        return np.array(counts, np.int64)

    def places(self, numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
        """List the (shard, block) of the blocks with these numbers [n], counted in file order."""
        ends = np.cumsum(self.block_counts)
        shards = np.searchsorted(ends, numbers, side="right")
        blocks = numbers - (ends - self.block_counts)[shards]
        return list(zip(shards.tolist(), blocks.tolist(), strict=True))

    def block_ends(self) -> NDArray[np.int64]:
        """Return where each of all blocks ends, [K]: the id after that of its last sample."""
        shards = range(len(self.shards))
        samples = run_in_threads(lambda shard: self.blocks(shard)[:, 1], shards, READERS)
        return np.cumsum(np.concatenate(samples))

    def find_shard(self, sample: int) -> int:
        """Return the number of the shard that holds a sample."""
        return int(np.searchsorted(self.first_ids, sample, side="right")) - 1

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
            names.check_path(shard.name, files.redact(self.url), "rename it")
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
        head |= {"plan": self.plan, "classes": self.classes}
        options = {"layout": self.layout.document(), "base": self.base, "pixels": self.pixels}
        head |= {name: given for name, given in options.items() if given}
        return head | {"shards": entries}


_REINDEX = "run `python launch/pack.py --index-only` on the shards again"


@dataclass(frozen=True)
class _Entry:
    """What index.json says of a shard."""

    name: str
    samples: Natural
    bytes: Natural
    checksum: str
    blocks: Any = None
    crcs: list[Sum32] | None = None


@dataclass(frozen=True)
class _Names:
    """The part of index.json that names the classes."""

    classes: Annotated[list[str], MaxLen(MOST_CLASSES)]


@dataclass(frozen=True)
class _Document(_Names):
    """The content of index.json."""

    version: int
    digest: str
    samples: Natural
    plan: str
    shards: list[_Entry]
    layout: Layout = field(default_factory=Layout)
    base: str = ""
    pixels: dict[str, Any] = field(default_factory=dict)


def sidecar(shard_name: str) -> str:
    return f"{shard_name}.blocks.json"


def _read_sidecar(url: str, shards: list[Shard], shard: int) -> Blocks:
    place, entry = files.join(url, sidecar(shards[shard].name)), shards[shard]
    try:
        blocks = check_blocks(_json(place), entry.samples, entry.bytes, "blocks")
    except FileNotFoundError:
        raise InputError(f"{files.redact(place)}: missing; {_REINDEX}") from None
    except OSError as error:  # Its text names the sidecar.
        raise InputError(str(error)) from None
    except InputError as error:
        raise InputError(f"{files.redact(place)}: is damaged: {error}; {_REINDEX}") from None
    if checksum(blocks) != entry.checksum:
        raise InputError(f"{files.redact(place)}: does not match {NAME}; {_REINDEX}")
    return blocks


def read_document(url: str) -> Any:
    """Read `index.json` without checking its content.

    Raises FileNotFoundError, or InputError when the file is not JSON.
    """
    return _json(files.join(url, NAME))


@without_gc()
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
        raise InputError(
            f"{place}: no {NAME} there; {say_what_to_do(url, field_name, NAME)}"
        ) from None
    except (InputError, OSError) as error:
        raise InputError(f"{place}: {error}") from None
    index = _checked(document, url, field_name, place)
    if index.samples == 0:
        raise InputError(f"{place}: the data set is empty")
    if files.is_local(index.folder):
        _check_sizes(index, place)
    return index


def class_names(document: Any) -> list[str]:
    """Return the class names in a document from `read_document`.

    Raises InputError when they are missing or damaged.
    """
    return build(_Names, document).classes


def _checked(document: Any, url: str, field_name: str, place: str) -> Index:
    """Make an Index of the content of index.json. Raises InputError when it is damaged."""
    version = document.get("version", VERSION) if isinstance(document, dict) else VERSION
    if version != VERSION:
        raise InputError(f"{place}: index version {shown(version)}, not {VERSION}; {_REINDEX}")
    try:
        content = build(_Document, document)
        shards = [_shard(entry, f"shards[{i}]") for i, entry in enumerate(content.shards)]
        if sum(shard.bytes for shard in shards) >= 2**62:
            raise InputError("shards must have less than 2**62 bytes together")
        index = Index(url, shards, content.classes, content.plan, content.layout)
        index.pixels = content.pixels
        if index.digest != content.digest == index.compute_digest(index.classes):
            index.stored_digest = content.digest
        if index.digest == content.digest and index.samples != content.samples:
            there = f"{index.samples}, as the shards say, not {content.samples}"
            raise InputError(f"samples must be {there}")
    except (InputError, UnicodeEncodeError) as error:
        raise InputError(f"{place}: {NAME}: is damaged: {error}; {_REINDEX}") from None
    for shard in shards:
        names.check_path(shard.name, f"{place}: {NAME}", _REINDEX)
    if content.base:
        index.base = names.check_url(content.base, field_name, f"{place}: {NAME}")
    if index.digest != content.digest:
        raise InputError(f"{place}: {NAME} does not match its own digest; {_REINDEX}")
    return index


def _shard(entry: _Entry, name: str) -> Shard:
    """Make a Shard from an entry of the index. Raises InputError when it is damaged."""
    if entry.samples > entry.bytes // BLOCK:
        raise InputError(f"{name}.samples must fit into {entry.bytes} bytes, not {entry.samples}")
    if entry.blocks is None:
        if entry.crcs is not None:
            raise InputError(f"{name}.crcs must be absent where the blocks are in a sidecar")
        return Shard(entry.name, entry.samples, entry.bytes, None, entry.checksum)
    blocks = check_blocks(entry.blocks, entry.samples, entry.bytes, f"{name}.blocks")
    if checksum(blocks) != entry.checksum:
        raise InputError(f"{name}.checksum is not that of its blocks")
    if entry.crcs is not None and len(entry.crcs) != len(blocks):
        raise InputError(f"{name}.crcs must be one for each block")
    return Shard(entry.name, entry.samples, entry.bytes, blocks, entry.checksum, entry.crcs)


def _check_sizes(index: Index, place: str) -> None:
    folder = files.local_path(index.folder)
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
    except ValueError as error:
        reason = f": {error}" if str(error).startswith("it ") else ""
        raise InputError(f"{files.redact(url)}: not valid JSON{reason}; {_REINDEX}") from None
