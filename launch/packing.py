"""Pack data sets with a progress bar, and print what was done to their images."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from shards.errors import printable
from shards.index import Index
from shards.making import pack
from shards.making.contents import Contents
from shards.making.convert import PixelOptions
from shards.making.survey import ReadImage, choose_window
from shards.storage import files
from shards.storage.commands import quote
from shards.storage.local_files import proposing

MB = 1_000_000
_SINGULAR = {"samples": "sample", "classes": "class", "shards": "shard"}


@cache
def open_console() -> Console:
    """Return the console on stderr, which is one, so that lines go above a bar that is shown."""
    return Console(stderr=True, markup=False, emoji=False)


@dataclass(frozen=True)
class Packing:
    """How a source is packed."""

    url: str
    shard_bytes: int
    seed: int
    threads: int
    overwrite: bool
    strict: bool
    options: PixelOptions
    percentiles: tuple[float, float] | None

    def write(self, sets: list[pack.ImageSet], read: ReadImage, place: str) -> None:
        """Pack data sets, each to a folder of its name."""
        options = self.options
        mend = f"choose another OUT than {files.redact(self.url)}"
        with _quiet_pillow(), proposing(mend, self.url):
            if options.window is None:
                options = self._choose_window(sets, read, place)
            for images in sets:
                self._write_set(images, read, options)

    def _write_set(self, images: pack.ImageSet, read: ReadImage, options: PixelOptions) -> None:
        plan = pack.plan_shards(images, self.shard_bytes, self.seed, options.facts())
        contents = Contents(options)
        with Bar(images.name or "packing", plan.image_bytes, len(plan.images)) as bar:
            index, written = pack.write_shards(
                plan,
                files.join(self.url, images.name) if images.name else self.url,
                read,
                convert=contents.convert,
                threads=self.threads,
                overwrite=self.overwrite,
                advance=bar.advance,
                report=warn,
            )
        for line in (*contents.list_conversions(), *contents.list_turned()):
            note(line)
        for line in contents.list_faults(len(plan.images)):
            warn(line)
        summarize(images.name, index, "" if written else "already packed: ")

    def _choose_window(
        self, sets: list[pack.ImageSet], read: ReadImage, place: str
    ) -> PixelOptions:
        """Find the window of the images of all sets that have more than 8 bits, if any have."""
        with open_console().status("looking for images of more than 8 bits"):
            window = choose_window(
                [image for images in sets for image in images.images],
                read,
                self.percentiles,
                place=files.redact(place),
                most=self.options.max_pixels,
                threads=self.threads,
            )
        if window is not None:
            note(f"the percentiles are the values {window[0]:g} and {window[1]:g}")
        return replace(self.options, window=window)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keep Pillow from printing warnings about images, because those that matter are counted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


class Bar:
    """Shows progress on stderr: the number of files done, MB/s and the time left."""

    def __init__(self, name: str, size: int | None, count: int | None) -> None:
        self._done, self._lock = 0, Lock()  # several threads call advance
        of = "" if count is None else f"/{count}"
        speed = () if size is None else (TransferSpeedColumn(), TimeRemainingColumn())
        done = TextColumn("{task.fields[done]}" + of, markup=False)
        self._progress = Progress(
            TextColumn(name, markup=False), BarColumn(), done, *speed, console=open_console()
        )
        self._task = self._progress.add_task(name, total=size, done=0)

    def advance(self, size: int) -> None:
        with self._lock:
            self._done += 1
            self._progress.start()
            self._progress.update(self._task, advance=size, done=self._done)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._done:  # otherwise a stop prints an empty line where no terminal is
            self._progress.stop()


def summarize(name: str, index: Index, note: str) -> None:
    size = sum(shard.bytes for shard in index.shards) / MB
    option = "--data.train" if name in ("", "train") else "--data.val"
    url = files.redact(index.url)
    counts = {"samples": index.samples, "classes": len(index.classes), "shards": len(index.shards)}
    held = ", ".join(f"{n:,} {_SINGULAR[what] if n == 1 else what}" for what, n in counts.items())
    place = files.join(url, "index.json")
    print(f"{note}{held}, {size:,.1f} MB: {place}; use {option} {quote(index.url)}")


def note(text: str) -> None:
    open_console().print(printable(text), soft_wrap=True)


def warn(text: str) -> None:
    note(f"warning: {text}")
