"""Pack images into shards that training streams, or index tars that others made.

    python launch/pack.py SOURCE OUT               a folder of images -> shards and their index
    python launch/pack.py --index-only SOURCE      tars in the WebDataset format -> an index

SOURCE and OUT are folders on a disk or in any object store (s3://, gs://, ...).
"""

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import Annotated

from launch.requirements import check_requirements

if __name__ == "__main__":  # the imports below would fail with a less helpful message
    check_requirements()

import tyro
from annotated_types import Interval
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from launch.plain_errors import plain_errors
from shards.dimensions import MOST_PIXELS, image_size
from shards.errors import InputError, printable
from shards.fields import check_range
from shards.index import Index
from shards.making import pack, scan
from shards.making.convert import PixelOptions, convert, packed_extension
from shards.making.image_folders import LeftOut, find_images, leave_out
from shards.making.pictures import UnusableError
from shards.making.survey import choose_window
from shards.making.window import check_window
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
    max_pixels: int = MOST_PIXELS,
    max_side: int | None = None,
    window: tuple[float, float] | None = None,
    window_percentiles: tuple[float, float] | None = None,
) -> None:
    """Pack images into shards that training streams, or index tars that others made.

    A folder of images is packed in random order. Its first folders name the classes. A flat folder
    has no classes. When the first folders are splits such as train and val, each is packed to a
    folder of that name under OUT. A packing that was stopped continues with the same command.

    Args:
        source: URL of a folder of images: jpg, png, webp, gif, bmp, tif and others. With
            --index-only, give a folder of tars or a brace pattern such as
            "s3://bucket/shard-{000000..000146}.tar".
        out: URL of the folder to write.
        shard_mb: Approximate size of a shard in MB.
        seed: Seed of the random order.
        threads: Number of shards written at a time. This takes threads x shard size x 2 of memory.
        overwrite: Replace the shards that OUT holds.
        index_only: Read the headers of the tars in SOURCE and write index.json next to them.
        classes: File with the names of the classes, one a line. Only for --index-only.
        max_pixels: Images of more pixels are named, and not decoded.
        max_side: Shrink images whose longer side has more pixels to that many, antialiased.
        window: LOW HIGH, the values that become black and white in images of more than 8 bits per
            channel. Values between them are mapped linearly to 8 bits.
        window_percentiles: LOW HIGH, the percentiles of the values in up to 64 of those images that
            are taken as the window.
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
        if max_side or window or window_percentiles or max_pixels != MOST_PIXELS:
            raise InputError(
                "--index-only copies no images: leave --max-pixels, --max-side and --window out"
            )
        _index(source, classes, threads)
    elif not out:
        raise InputError("OUT: where the shards go is missing: pack.py SOURCE OUT")
    elif classes:
        raise InputError("--classes is for --index-only; folders name the classes otherwise")
    else:
        check_range("--max-pixels", max_pixels, Interval(ge=1, le=2**32))
        check_range("--max-side", max_side, Interval(ge=1, le=2**16))
        check_window("--window", window, -math.inf, math.inf)
        check_window("--window-percentiles", window_percentiles, 0, 100)
        if window and window_percentiles:
            raise InputError("--window and --window-percentiles exclude each other: give one")
        options = PixelOptions(max_pixels, max_side, window)
        _pack(source, out, shard_mb, seed, threads, overwrite, options, window_percentiles)


def _pack(
    source: str,
    out: str,
    shard_mb: float,
    seed: int,
    threads: int,
    overwrite: bool,
    options: PixelOptions,
    percentiles: tuple[float, float] | None,
) -> None:
    with _console.status(Text(f"listing {files.redact(source)}")):
        found = find_images(source)
    for reason, files_there in found.left_out.items():
        example = printable(files_there.example)
        _console.print(f"left out: {files_there.number:,} {reason}, such as {example}")
    for warning in found.warnings:
        _warn(warning)
    if options.window is None:
        options = _choose_window(source, found.sets, options, percentiles, threads)
    for images in found.sets:
        plan = pack.plan_shards(images, int(shard_mb * MB), seed, options.facts())
        url = files.join(out, images.name) if images.name else out
        contents = _Contents(source, options)
        with (
            _quiet_pillow(),
            _Bar(images.name or "packing", plan.image_bytes, len(plan.images)) as bar,
        ):
            index, written = pack.write_shards(
                plan,
                url,
                contents.read,
                convert=contents.convert,
                threads=threads,
                overwrite=overwrite,
                advance=bar.advance,
                report=_warn,
            )
        contents.report(len(plan.images))
        _summarize(images.name, index, "" if written else "already packed: ")


def _choose_window(
    source: str,
    sets: list[pack.ImageSet],
    options: PixelOptions,
    percentiles: tuple[float, float] | None,
    threads: int,
) -> PixelOptions:
    """Find the window of the images of all sets that have more than 8 bits, if there are any."""
    with _quiet_pillow(), _console.status("looking for images of more than 8 bits"):
        window = choose_window(
            [image for images in sets for image in images.images],
            lambda image, start, stop: files.read(files.join(source, image.path), start, stop),
            percentiles,
            place=files.redact(source),
            most=options.max_pixels,
            threads=threads,
        )
    if window is not None:
        _console.print(f"the percentiles are the values {window[0]:g} and {window[1]:g}")
    return replace(options, window=window)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keep Pillow from printing warnings about images, because those that matter are counted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


class _Contents:
    """Read and convert image files, and count what was converted and what cannot be used."""

    def __init__(self, source: str, options: PixelOptions) -> None:
        self._bad: dict[str, LeftOut] = {}  # by reason
        self._converted: dict[str, LeftOut] = {}  # by what was done
        self._large = (0, "")  # pixels and path of the largest image
        self._source, self._options, self._lock = source, options, Lock()  # several threads read

    def read(self, image: pack.Image) -> bytes:
        return files.read(files.join(self._source, image.path))

    def convert(self, image: pack.Image, content: bytes) -> tuple[str, bytes]:
        """Return the extension and the content to pack. What cannot be used stays as it is."""
        try:
            extension, content, done = convert(image.path, content, self._options)
        except UnusableError as error:
            with self._lock:
                leave_out(self._bad, str(error), image.path)
            return packed_extension(image.path, content), content
        width, height = image_size(content) or (0, 0)
        with self._lock:
            self._large = max(self._large, (width * height, image.path))
            if done:
                leave_out(self._converted, done, image.path)
        return extension, content

    def report(self, total: int) -> None:
        """Print one line for each thing that was done to images, and for each fault."""
        for done, some in sorted(self._converted.items()):
            text = f"converted: {some.number:,} {done}, such as {some.example}"
            _console.print(printable(text), soft_wrap=True)
        for reason, bad in sorted(self._bad.items()):
            share = f"{bad.number:,} of {total:,} images ({reason})"
            _warn(f"cannot be decoded: {share}, such as {bad.example}")
        pixels, path = self._large
        if pixels > MOST_PIXELS:
            _warn(
                f"{path} has {pixels:,} pixels: train with --data.max-pixels {pixels}, or shrink "
                "it with --max-side"
            )


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
