"""Tars of any members, and their index."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from shards.index import Index
from shards.making import scan
from shards.making.scan import Indexed
from shards.making.tars import find_tars
from shards.samples import Layout


def write_tar(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    """Write files, then symbolic links (name: target), in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


def scan_tars(
    *sources: str,
    out: str = "",
    layout: Layout | None = None,
    classes: list[str] | None = None,
    skip_damaged: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Indexed:
    tars = find_tars(list(sources))
    return scan.index_tars(
        tars,
        out=out or tars.folder,
        layout=layout or Layout(),
        classes=classes,
        skip_damaged=skip_damaged,
        threads=2,
        report=report,
    )


def make_index(source: str, classes: list[str] | None = None) -> Index:
    """Index the tars of a folder or pattern in their folder, as `pack.py --index-only` does."""
    indexed = scan_tars(source, classes=classes)
    scan.save(indexed, lambda _: None)
    return indexed.made
