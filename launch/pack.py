"""Pack images into shards that training streams, or index tars that others made.

    python launch/pack.py IMAGES OUT               a folder of images -> shards and their index
    python launch/pack.py --index-only TARS        tars in the WebDataset format -> an index
    python launch/pack.py TARS OUT                 tars of any kind -> shards in random order

IMAGES, TARS and OUT are folders on a disk or in any object store (s3://, gs://, ...).
"""

import sys
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Annotated

from launch.requirements import check_requirements

if __name__ == "__main__":  # the imports below would fail with a less helpful message
    check_requirements()

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from launch.plain_errors import plain_errors
from shards.errors import InputError, printable
from shards.index import Index
from shards.making import kept_scans, pack, scan
from shards.making.image_folders import find_images
from shards.making.labels import read_class_names
from shards.making.left_out import Reasons, leave_out, tabulate
from shards.making.repack import ClassesFrom, find_packed_images
from shards.making.tars import Tars, check_apart, check_suffix, find_tars
from shards.making.undecodable import find_fault
from shards.samples import Layout
from shards.storage import files
from shards.tar import is_tar

MB = 1_000_000

_console = Console(stderr=True, markup=False)


def main(
    paths: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE [SOURCE ...] OUT")
    ],
    *,
    shard_mb: float = 64,
    seed: int = 0,
    threads: int = 8,
    overwrite: bool = False,
    strict: bool = False,
    follow_links: bool = False,
    index_only: bool = False,
    out: Annotated[str, tyro.conf.arg(metavar="URL")] = "",
    classes: Annotated[str, tyro.conf.arg(metavar="FILE")] = "",
    classes_from: ClassesFrom = "labels",
    image: Annotated[str, tyro.conf.arg(metavar="FIELD")] = "",
    label: Annotated[str, tyro.conf.arg(metavar="FIELD")] = "",
    dotted: bool = False,
    skip_damaged: bool = False,
) -> None:
    """Pack images into shards that training streams, or index tars that others made.

    A folder of images is packed in random order. Its first folders name the classes. A flat folder
    has no classes. When the first folders are splits such as train and val, each is packed to a
    folder of that name under OUT. The images of tars are packed anew in the same way. A table says
    what was taken and what was left out. A packing that was stopped continues with the same
    command.

    Args:
        paths: URL of a folder of images, or URLs of tars, then the URL of the folder to write. A
            tar may be a folder of tars or a brace pattern such as
            "s3://bucket/shard-{000000..000146}.tar". With --index-only, give tars alone.
        shard_mb: Approximate size of a shard in MB.
        seed: Seed of the random order.
        threads: Number of shards written at a time. This takes threads x shard size x 2 of memory.
        overwrite: Replace the shards that OUT holds.
        strict: Fail before anything is written when anything was left out.
        follow_links: Also pack files outside of SOURCE that links in it lead to.
        index_only: Read the headers of tars and write index.json next to them.
        out: With --index-only: the folder for index.json, when it can't stand next to the tars.
        classes: File with the names of the classes, one a line. Only for tars.
        classes_from: What gives the class of an image in a tar: its label, the name of its tar, or
            the folder in its name. The last two need OUT.
        image: The field of a sample that holds its image, such as input.jpg. Only for tars.
        label: The field of a sample that holds its label, such as txt, or json:KEY for a value in a
            JSON field. Only for tars.
        dotted: The dots in the names of files in tars belong to the names, except the last one.
        skip_damaged: Leave out tars that are damaged or missing.
    """
    for number, path in enumerate([*paths, out]):
        files.check(path, "OUT" if number >= len(paths) - (not index_only) else "SOURCE")
    if threads < 1:
        raise InputError("--threads must be at least 1")
    if not 0 < shard_mb < 1e6:  # this also refuses nan
        raise InputError("--shard-mb must be positive and below 1,000,000")
    if not paths:
        raise InputError("SOURCE and OUT are missing: give pack.py SOURCE OUT")
    field, colon, key = label.partition(":")
    layout = Layout(image.lower().lstrip("."), field.lower().lstrip(".") + colon + key, dotted)
    if index_only:
        if classes_from != "labels":
            raise InputError(
                "--classes-from: an index takes classes from labels alone: repack the tars with "
                "`python launch/pack.py SOURCE OUT`"
            )
        _index(list(paths), out, layout, classes, threads, strict, skip_damaged)
        return
    if len(paths) == 1 or out:
        raise InputError("OUT is missing, the folder for the shards: give pack.py SOURCE OUT")
    write = partial(
        _write, url=paths[-1], shard_mb=shard_mb, seed=seed, threads=threads, overwrite=overwrite
    )
    sources = list(paths[:-1])
    plain = layout == Layout() and not classes and classes_from == "labels"
    folder = plain and len(sources) == 1 and not is_tar(sources[0], compressed=True)
    if not (folder and _pack_folder(sources[0], follow_links, strict, write)):
        names = read_class_names(classes) if classes else None
        tars = find_tars(sources, compressed=True)
        check_apart(tars, paths[-1])
        _repack(tars, layout, classes_from, names, skip_damaged, threads, strict, write)


def _pack_folder(source: str, follow_links: bool, strict: bool, write: Callable[..., None]) -> bool:
    """Pack the images of a folder. Return False, and do nothing, if it holds tars instead."""
    check_suffix(source)
    with _console.status(Text(f"listing {files.redact(source)}")):
        found = find_images(source, follow_links=follow_links)
    if not found.sets:
        return False
    number = sum(len(part.images) for part in found.sets)
    _tell({"images taken": number}, found.left_out, found.warnings, strict)
    for part in found.sets:
        write(part, lambda image: files.read(files.join(source, image.path)))
    return True


def _repack(
    tars: Tars,
    layout: Layout,
    classes_from: ClassesFrom,
    classes: list[str] | None,
    skip_damaged: bool,
    threads: int,
    strict: bool,
    write: Callable[..., None],
) -> None:
    """Pack the images of tars anew."""
    with TemporaryDirectory() as scratch:
        with _console.status("reading the headers of the tars"):
            found = find_packed_images(
                tars,
                layout=layout,
                classes_from=classes_from,
                classes=classes,
                skip_damaged=skip_damaged,
                threads=threads,
                scratch=scratch,
                report=_note,
            )
        number = sum(len(part.images) for part in found.sets)
        _tell({"images taken": number}, found.left_out, found.warnings, strict)
        for part in found.sets:
            write(part, found.read)


def _write(
    images: pack.ImageSet,
    read: Callable[[pack.Image], bytes],
    *,
    url: str,
    shard_mb: float,
    seed: int,
    threads: int,
    overwrite: bool,
) -> None:
    """Pack one data set."""
    plan = pack.plan_shards(images, int(shard_mb * MB), seed)
    url = files.join(url, images.name) if images.name else url
    contents = _Contents(read)
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


def _tell(taken: dict[str, int], left_out: Reasons, warnings: list[str], strict: bool) -> None:
    """Print what was taken and left out. Raise InputError if `strict` and anything was left out."""
    if left_out:
        for line in tabulate(taken, left_out):
            _note(line)
    for warning in warnings:
        _warn(warning)
    if strict and left_out:
        number = sum(left.number for left in left_out.values())
        raise InputError(
            f"--strict: {number:,} {'was' if number == 1 else 'were'} left out, see the table: no "
            "shards and no index were written"
        )


class _Contents:
    """Read image files, and count those that training will not be able to decode."""

    def __init__(self, read: Callable[[pack.Image], bytes]) -> None:
        self.bad: Reasons = {}
        self._read, self._lock = read, Lock()  # several threads read

    def read(self, image: pack.Image) -> bytes:
        content = self._read(image)
        if fault := find_fault(content):
            with self._lock:
                leave_out(self.bad, fault, image.path)
        return content


def _index(
    sources: list[str],
    out: str,
    layout: Layout,
    classes: str,
    threads: int,
    strict: bool,
    skip_damaged: bool,
) -> None:
    names = read_class_names(classes) if classes else None
    tars = find_tars(sources)
    place = out or tars.folder
    with kept_scans.telling_what_stays(place, _note):
        with _Bar("indexing", None, len(tars.names)) as bar:
            indexed = scan.index_tars(
                tars,
                out=place,
                layout=layout,
                classes=names,
                skip_damaged=skip_damaged,
                threads=threads,
                report=_note,
                advance=bar.advance,
            )
        _tell({"samples taken": indexed.made.samples}, indexed.left_out, indexed.warnings, strict)
    scan.save(indexed, _warn)
    _summarize("", indexed.made, "")


def _note(text: str) -> None:
    _console.print(printable(text), soft_wrap=True)


def _warn(text: str) -> None:
    _note(f"warning: {text}")


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
        f"{note}{index.samples:,} sample{'s' * (index.samples != 1)}, "
        f"{len(index.classes)} class{'es' * (len(index.classes) != 1)}, "
        f"{len(index.shards)} shard{'s' * (len(index.shards) > 1)}, {size:,.1f} MB: "
        f"{files.join(url, 'index.json')}; use {option} {url}"
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
