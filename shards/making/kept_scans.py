"""Keep what was found in each tar until the index is written, for a call that goes on from it."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from shards.blocks import check_blocks, checksum
from shards.digest import digest
from shards.documents import Natural, build
from shards.errors import InputError
from shards.index import Shard
from shards.making.left_out import LeftOut
from shards.making.scan_tar import Scan
from shards.samples import Layout
from shards.storage import files
from shards.storage.retries import retry

_WORK = ".index"  # This folder holds what was found so far.
_BEGUN = "begun"
# What storage libraries call the time or the tag of an object's content.
_VERSIONS = ("mtime", "ino", "ETag", "etag", "LastModified", "Last-Modified", "md5Hash", "updated")


def begin(out: str) -> None:
    """Make sure that `out` can be written. Raises OSError."""
    files.write(files.join(out, _WORK, _BEGUN), b"")


def keep(found: Scan, layout: Layout, version: list[str], out: str) -> None:
    """Keep what was found in a version of a tar."""
    content = json.dumps(_record(found, layout, version)).encode()
    files.write(_record_url(out, found.shard.name), content)


def forget(out: str, report: Callable[[str], None]) -> None:
    """Remove what was kept."""
    files.discard(files.join(out, _WORK), out, report)


@contextlib.contextmanager
def telling_what_stays(out: str, report: Callable[[str], None]) -> Iterator[None]:
    """When the block fails, tell what stays at `out` for the next call, or clean up.

    What an index is made of takes long to find, so it is kept.
    """
    try:
        yield
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and not files.is_local(out):
            raise  # The store may be out of reach.
        if not files.exists(files.join(out, _WORK, _BEGUN)):
            raise  # Nothing could be written.
        work = files.join(out, _WORK)
        if number := sum(name != _BEGUN for name in files.list_names(work)):
            of = f"{number:,} tar{'s' * (number > 1)}"
            report(
                f"{files.redact(work)} keeps what was found in {of}: the next call goes on from "
                "it, and without one you may remove it"
            )
        else:
            forget(out, report)
        raise


def read_version(url: str) -> list[str]:
    """Return what changes when a file is replaced: its size, and its time or tag.

    Raises FileNotFoundError.
    """
    filesystem, path = files.client(url)
    info = retry(url, lambda: filesystem.info(path))
    if info.get("size") is None:
        raise OSError(f"{files.redact(url)}: the server does not tell the length: download it")
    return [str(info.get(key, "")) for key in ("size", *_VERSIONS)]


def find_kept(name: str, version: list[str], layout: Layout, out: str) -> Scan | None:
    """Return what an earlier call found in this version of a tar, if it is kept."""
    # A damaged record counts as no record, and the tar is scanned again.
    with contextlib.suppress(FileNotFoundError, ValueError, InputError):
        return _from_record(files.read_json(_record_url(out, name)), name, version, layout)
    return None


def _record_url(out: str, name: str) -> str:
    return files.join(out, _WORK, f"{digest(name)}.json")


def _record(found: Scan, layout: Layout, version: list[str]) -> dict[str, Any]:
    shard = found.shard
    assert shard.blocks is not None
    texts = sorted(set(found.labels))
    places = {text: i for i, text in enumerate(texts)}
    return {
        "name": shard.name,
        "layout": asdict(layout),
        "version": version,
        "bytes": shard.bytes,
        "blocks": shard.blocks.tolist(),
        "texts": texts,
        "labels": [places[text] for text in found.labels],
        "left_out": found.left_out,
        "fields": found.fields,
        "folders": found.folders,
        "twice": found.twice,
    }


@dataclass(frozen=True)
class _Record:
    """What a call keeps of a tar that it has scanned."""

    name: str
    layout: Layout
    version: list[str]
    bytes: Natural
    blocks: Any
    texts: list[str]
    labels: list[Natural]
    left_out: dict[str, tuple[Natural, str]]
    fields: list[str]
    folders: list[str]
    twice: Natural


def _from_record(document: object, name: str, version: list[str], layout: Layout) -> Scan:
    """Return what an earlier call found in a tar.

    Raises ValueError when the tar has changed, and InputError when the record is damaged.
    """
    record = build(_Record, document)
    if (record.name, record.layout, record.version) != (name, layout, version):
        raise ValueError(name)
    if any(label >= len(record.texts) for label in record.labels):
        raise ValueError(name)
    blocks = check_blocks(record.blocks, len(record.labels), record.bytes, "blocks")
    shard = Shard(name, len(record.labels), record.bytes, blocks, checksum(blocks))
    labels = [record.texts[label] for label in record.labels]
    left_out = {why: LeftOut(*found) for why, found in record.left_out.items()}
    return Scan(shard, labels, left_out, record.fields, record.folders, record.twice)
