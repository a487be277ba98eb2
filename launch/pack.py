"""Pack images into shards that training streams, or index tars that others made.

    python launch/pack.py SOURCE OUT               a folder of images -> shards and their index
    python launch/pack.py --index-only SOURCE      tars in the WebDataset format -> an index

SOURCE and OUT are folders on a disk or in any object store (s3://, gs://, ...).
"""

import sys
from threading import Lock
from typing import Annotated

from launch.plain_output import prepare_output
from launch.requirements import check_requirements

if __name__ == "__main__":  # the imports below would fail with a less helpful message
    check_requirements()
    prepare_output()

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from launch.plain_errors import plain_errors
from shards.errors import InputError, printable
from shards.index import Index
from shards.making import pack, scan
from shards.making.image_folders import LeftOut, find_images, leave_out
from shards.making.undecodable import find_fault
from shards.storage import files

MB = 1_000_000

_console = Console(stderr=True, markup=False)


def main(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")] = "",
    *,
    shard_mb: float = 64,
    seed: int = 0,
    threads: int = 8,
    overwrite: bool = False,
    index_only: bool = False,
    classes: Annotated[str, tyro.conf.arg(metavar="FILE")] = "",
) -> None:
    """Pack images into shards that training streams, or index tars that others made.

    A folder of images is packed in random order. Its first folders name the classes. A flat folder
    has no classes. When the first folders are splits such as train and val, each is packed to a
    folder of that name under OUT. A packing that was stopped continues with the same command.

    Args:
        source: URL of a folder of jpg, jpeg, png or webp files. With --index-only, give a folder of
            tars or a brace pattern such as "s3://bucket/shard-{000000..000146}.tar".
        out: URL of the folder to write.
        shard_mb: Approximate size of a shard in MB.
        seed: Seed of the random order.
        threads: Number of shards written at a time. This takes threads x shard size x 2 of memory.
        overwrite: Replace the shards that OUT holds.
        index_only: Read the headers of the tars in SOURCE and write index.json next to them.
        classes: File with the names of the classes, one a line. Only for --index-only.
    """
    files.check(source, "SOURCE")
    files.check(out, "OUT")
    if threads < 1:
        raise InputError("--threads must be at least 1")
    if not 0 < shard_mb < 1e6:  # this also refuses nan
        raise InputError("--shard-mb must be positive and below 1,000,000")
    if index_only:
        if out:
            raise InputError("OUT: --index-only writes next to the tars; leave OUT out")
        _index(source, classes, threads)
    elif not out:
        raise InputError("OUT: where the shards go is missing: pack.py SOURCE OUT")
    elif classes:
        raise InputError("--classes is for --index-only; folders name the classes otherwise")
    else:
        _pack(source, out, shard_mb, seed, threads, overwrite)


def _pack(source: str, out: str, shard_mb: float, seed: int, threads: int, overwrite: bool) -> None:
    with _console.status(Text(f"listing {files.redact(source)}")):
        found = find_images(source)
    for reason, files_there in found.left_out.items():
        example = printable(files_there.example)
        _console.print(f"left out: {files_there.number:,} {reason}, such as {example}")
    for warning in found.warnings:
        _warn(warning)
    for images in found.sets:
        plan = pack.plan_shards(images, int(shard_mb * MB), seed)
        url = files.join(out, images.name) if images.name else out
        contents = _Contents(source)
        with _Bar(images.name or "packing", plan.image_bytes, len(plan.images)) as bar:
            index, written = pack.write_shards(
                plan,
                url,
                contents.read,
                threads=threads,
                overwrite=overwrite,
                advance=bar.advance,
                report=_warn,
            )
        for reason, bad in contents.bad.items():
            share = f"{bad.number:,} of {len(plan.images):,} images ({reason})"
            _warn(f"cannot be decoded: {share}, such as {bad.example}")
        _summarize(images.name, index, "" if written else "already packed: ")


class _Contents:
    """Read image files, and count those that training will not be able to decode."""

    def __init__(self, source: str) -> None:
        self.bad: dict[str, LeftOut] = {}  # by reason
        self._source, self._lock = source, Lock()  # several threads read

    def read(self, image: pack.Image) -> bytes:
        content = files.read(files.join(self._source, image.path))
        if fault := find_fault(content):
            with self._lock:
                leave_out(self.bad, fault, image.path)
        return content


def _index(source: str, classes: str, threads: int) -> None:
    names = None
    if classes:
        try:
            names = files.read(classes).decode().splitlines()
        except FileNotFoundError:
            raise InputError(f"--classes {files.redact(classes)}: no such file") from None
    with _Bar("indexing", None, None) as bar:
        index = scan.index_tars(
            source,
            classes=names,
            threads=threads,
            report=_warn,
            advance=bar.advance,
        )
    _summarize("", index, "")


def _warn(text: str) -> None:
    _console.print(f"warning: {printable(text)}", soft_wrap=True)


class _Bar:
    """Shows progress on stderr: the number of files done, MB/s and the time left."""

    def __init__(self, name: str, size: int | None, count: int | None) -> None:
        self._done, self._lock = 0, Lock()  # several threads call advance
        of = "" if count is None else f"/{count}"
        speed = () if size is None else (TransferSpeedColumn(), TimeRemainingColumn())
        done = TextColumn("{task.fields[done]}" + of)
        self._progress = Progress(TextColumn(name), BarColumn(), done, *speed, console=_console)
        self._task = self._progress.add_task(name, total=size, done=0)

    def advance(self, size: int) -> None:
        with self._lock:
            self._done += 1
            self._progress.start()
            self._progress.update(self._task, advance=size, done=self._done)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _summarize(name: str, index: Index, note: str) -> None:
    size = sum(shard.bytes for shard in index.shards) / MB
    option = "--data.train" if name in ("", "train") else "--data.val"
    url = files.redact(index.url)
    print(
        f"{note}{index.samples:,} samples, {len(index.classes)} classes, "
        f"{len(index.shards)} shards, {size:,.1f} MB: {url}/index.json; use {option} {url}"
    )


if __name__ == "__main__":
    try:
        with plain_errors():
            tyro.cli(
                main,
                prog="python launch/pack.py",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except (InputError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
