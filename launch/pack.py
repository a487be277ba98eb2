"""Pack images into shards that training streams, or index tars that others made.

    python launch/pack.py IMAGES OUT               a folder of images -> shards and their index
    python launch/pack.py --index-only TARS        tars in the WebDataset format -> an index
    python launch/pack.py TARS OUT                 tars of any kind -> shards in random order
    python launch/pack.py PARQUETS OUT             parquet files of the Hugging Face Hub -> shards
    python launch/pack.py ZIPS OUT                 zip files of images -> shards
    python launch/pack.py SOURCE OUT --labels CSV  images whose classes stand in a table -> shards

IMAGES, TARS, PARQUETS, ZIPS and OUT are folders on a disk or in any object store (s3://, ...).
"""

import math
import sys
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Annotated

try:
    from launch import imports
except ModuleNotFoundError as error:  # This Python is not the one that the project is installed in.
    sys.exit(f"error: {error}: run `. .venv/bin/activate`, or install it: pip install -e .")

if __name__ == "__main__":  # the imports below would fail with a less helpful message
    imports.begin()

import tyro
from annotated_types import Interval
from rich.text import Text

from launch.help_texts import join_help_lines
from launch.packing import MB, Bar, Packing, note, open_console, summarize, warn
from launch.plain_errors import list_options, plain_errors
from shards.dimensions import MOST_PIXELS
from shards.errors import InputError, printable
from shards.fields import check_range
from shards.making import kept_scans, pack, scan
from shards.making.convert import PixelOptions
from shards.making.image_folders import Found, find_images, make_sets
from shards.making.label_table import LabelTable
from shards.making.labels import read_class_names
from shards.making.left_out import Reasons, tabulate
from shards.making.repack import ClassesFrom, Repacking, find_packed_images
from shards.making.survey import ReadImage
from shards.making.tars import Tars, check_apart, check_suffix, find_tars, is_one_file
from shards.making.window import check_window
from shards.making.zips import are_zips, list_zips
from shards.samples import Layout
from shards.storage import files, misplaced
from shards.storage.local_files import proposing


@dataclass(frozen=True)
class Taking:
    """Which images of a source are taken, and what gives their classes."""

    layout: Layout
    classes_from: ClassesFrom
    classes: list[str] | None  # their names in order
    labels: str  # URL of a table, or ""
    follow_links: bool
    skip_damaged: bool

    @property
    def table(self) -> LabelTable | None:
        if not self.labels:
            return None
        return LabelTable(self.labels, self.layout.label, self.classes, note)

    def is_plain(self, by_name: bool = False) -> bool:
        """Return whether nothing is asked for that only tars have.

        Args:
            by_name: Files may name classes, as zip files may.
        """
        layout = self.layout
        if layout.image or layout.dotted or self.classes_from == "folders":
            return False
        if self.classes_from == "tars" and not by_name:
            return False
        return bool(self.labels) or not (layout.label or self.classes)


def main(
    paths: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="SOURCE [SOURCE ...] OUT", help_behavior_hint=""),
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
    labels: Annotated[str, tyro.conf.arg(metavar="FILE")] = "",
    image: Annotated[str, tyro.conf.arg(metavar="FIELD")] = "",
    label: Annotated[str, tyro.conf.arg(metavar="FIELD")] = "",
    dotted: bool = False,
    skip_damaged: bool = False,
    max_pixels: int = MOST_PIXELS,
    max_side: int | None = None,
    window: tuple[float, float] | None = None,
    window_percentiles: tuple[float, float] | None = None,
) -> None:
    """Pack images into shards that training streams, or index tars that others made.

    A folder of images is packed in random order. Its first folders name the classes. A flat folder
    has no classes. When the first folders are splits such as train and val, each is packed to a
    folder of that name under OUT. A zip file is packed like a folder. The images of tars and of
    parquet files are packed anew in the same way. A table says what was taken and what was left
    out. A packing that was stopped continues with the same command.

    Args:
        paths: URL of a folder of images (jpg, png, webp, gif, bmp, tif and others) or of a folder
            of zip files, tars or parquet files, then the URL of the folder to write. Zip files,
            tars and parquet files may also be given one by one, or by a brace pattern such as
            "s3://bucket/shard-{000000..000146}.tar". With --index-only, give tars alone.
        shard_mb: Approximate size of a shard in MB.
        seed: Seed of the random order.
        threads: Number of shards written at a time. This takes threads x shard size x 2 of memory.
        overwrite: Replace the shards that OUT holds.
        strict: Fail before anything is written when anything was left out.
        follow_links: Also pack files outside of SOURCE that links in it lead to.
        index_only: Read the headers of tars and write index.json next to them.
        out: With --index-only: the folder for index.json, when it can't stand next to the tars.
        classes: File with the names of the classes, one a line. Only for tars, parquet files and
            --labels.
        classes_from: What gives the class of an image in a tar: its label, the name of its tar, or
            the folder that it lies in. tars also takes the names of zip files. none packs images of
            any kind without classes. All but labels need OUT.
        labels: URL of a table that names the class of each image: CSV, TSV or lines of a name and a
            label.
        image: The field of a sample in a tar that holds its image, such as input.jpg, or the column
            of a parquet file.
        label: The field of a sample in a tar that holds its label, such as txt, or json:KEY for a
            value in a JSON field, or the column of a parquet file or of --labels.
        dotted: The dots in the names of files in tars belong to the names, except the last one.
        skip_damaged: Leave out tars and zip files that are damaged or missing, and damaged images
            in zip files, for which it reads all of them once more.
        max_pixels: Images of more pixels are named, and not decoded.
        max_side: Shrink images whose longer side has more pixels to that many, antialiased.
        window: LOW HIGH, the values that become black and white in images of more than 8 bits per
            channel. Values between them are mapped linearly to 8 bits.
        window_percentiles: LOW HIGH, the percentiles of the values in up to 64 of those images that
            are taken as the window.
    """
    for number, path in enumerate([*paths, out]):
        files.check(path, "OUT" if number >= len(paths) - (not index_only) else "SOURCE")
    files.check(labels, "--labels")
    _check_out(paths[-1] if paths and not index_only else out)
    if threads < 1:
        raise InputError("--threads must be at least 1")
    if not 0 < shard_mb < 1e6:  # this also refuses nan
        raise InputError("--shard-mb must be positive and below 1,000,000")
    if not paths:
        raise InputError("SOURCE and OUT are missing: give pack.py SOURCE OUT")
    field, colon, key = label.partition(":")
    layout = Layout(image.lower().lstrip("."), field.lower().lstrip(".") + colon + key, dotted)
    options = PixelOptions(max_pixels, max_side, window)
    if index_only:
        if classes_from != "labels" or labels or options.facts() or window_percentiles:
            raise InputError(
                "--index-only copies no images: leave out --classes-from, --labels, --max-pixels, "
                "--max-side and --window, or pack them anew: pack.py TARS OUT"
            )
        _index(list(paths), out, layout, classes, threads, strict, skip_damaged)
        return
    if len(paths) == 1 or out:
        raise InputError("OUT is missing, the folder for the shards: give pack.py SOURCE OUT")
    _check_pixels(options, window_percentiles)
    files.check_no_root(paths[-1], "OUT", "shards", "mine")
    packing = Packing(
        paths[-1], int(shard_mb * MB), seed, threads, overwrite, strict, options, window_percentiles
    )
    names = read_class_names(classes) if classes else None
    taking = Taking(layout, classes_from, names, labels, follow_links, skip_damaged)
    _pack(list(paths[:-1]), taking, packing)


def _check_pixels(options: PixelOptions, percentiles: tuple[float, float] | None) -> None:
    """Raise InputError when an option about pixels is out of its bounds."""
    check_range("--max-pixels", options.max_pixels, Interval(ge=1, le=2**32))
    check_range("--max-side", options.max_side, Interval(ge=1, le=2**16))
    check_window("--window", options.window, -math.inf, math.inf)
    check_window("--window-percentiles", percentiles, 0, 100)
    if options.window and percentiles:
        raise InputError("--window and --window-percentiles exclude each other: give one")


def _check_out(url: str) -> None:
    """Raise InputError when OUT is a file, or is called like one that the folder will hold."""
    if url:
        files.check_folder(url, "OUT")
    if url.rstrip("/").endswith((".tar", ".json")):
        raise InputError(
            f"OUT {files.redact(url)}: is the folder to write, which holds such files: give "
            f"{files.redact(misplaced.folder_of(url))}"
        )


def _pack(sources: list[str], taking: Taking, packing: Packing) -> None:
    """Pack a folder of images, zip files, or what `find_tars` finds."""
    if (label := taking.layout.label).endswith((".csv", ".tsv")):
        raise InputError(f"--label {label}: names a field or a column: a table is --labels {label}")
    folder = len(sources) == 1 and not is_one_file(sources[0], compressed=True)
    if folder and taking.is_plain() and _pack_folder(sources[0], taking, packing):
        return
    tars = find_tars(sources, compressed=True)
    check_apart(tars, sources, packing.url)
    if are_zips(tars):
        if not taking.is_plain(by_name=True):
            raise InputError(
                "zip files are packed like folders, whose first folders name the classes: leave "
                "out --image, --dotted and --classes-from folders, and give --label and --classes "
                "only with --labels"
            )
        _pack_zips(tars, taking, packing)
    else:
        _repack(tars, taking, packing)


def _pack_folder(source: str, taking: Taking, packing: Packing) -> bool:
    """Pack the images of a folder. Return False, and do nothing, if it holds tars instead."""
    check_suffix(source)
    with open_console().status(Text(f"listing {files.redact(source)}")):
        found = find_images(
            source,
            follow_links=taking.follow_links,
            labels=taking.classes_from != "none",
            table=taking.table,
        )
    if not found.sets:
        return False

    def read(image: pack.Image, start: int | None = None, stop: int | None = None) -> bytes:
        return files.read(files.join(source, image.path), start, stop)

    _write(found, read, source, packing)
    return True


def _pack_zips(zips: Tars, taking: Taking, packing: Packing) -> None:
    """Pack the images of zip files, as if they were those of a folder."""
    place, by_zip = files.redact(zips.folder), taking.classes_from == "tars"
    with open_console().status("reading what the zip files hold"):
        listing, read = list_zips(
            zips, by_zip=by_zip, skip_damaged=taking.skip_damaged, threads=packing.threads
        )
        labels = taking.classes_from != "none"
        found = make_sets(listing, place, labels=labels, table=taking.table)
    _write(found, read, zips.folder, packing)


def _repack(tars: Tars, taking: Taking, packing: Packing) -> None:
    """Pack the images of tars anew."""
    with TemporaryDirectory() as scratch:
        with open_console().status("reading what the tars hold"):
            found = find_packed_images(
                tars,
                layout=taking.layout,
                classes_from=taking.classes_from,
                classes=taking.classes,
                table=taking.table,
                skip_damaged=taking.skip_damaged,
                threads=packing.threads,
                scratch=scratch,
                report=note,
            )
        _write(found, found.read, tars.folder, packing)


def _write(found: Found | Repacking, read: ReadImage, place: str, packing: Packing) -> None:
    """Pack the images that were found, after a table of them."""
    number = sum(len(part.images) for part in found.sets)
    _tell({"images taken": number}, found.left_out, found.warnings, packing.strict)
    packing.write(found.sets, read, place)


def _tell(taken: dict[str, int], left_out: Reasons, warnings: list[str], strict: bool) -> None:
    """Print what was taken and left out. Raise InputError if `strict` and anything was left out."""
    if left_out:
        for line in tabulate(taken, left_out):
            note(line)
    for warning in warnings:
        warn(warning)
    if strict and left_out:
        number = sum(left.number for left in left_out.values())
        raise InputError(
            f"--strict: {number:,} {'was' if number == 1 else 'were'} left out, see the table: no "
            "shards and no index were written"
        )


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
    with kept_scans.telling_what_stays(place, note):
        with Bar("indexing", None, len(tars.names)) as bar:
            indexed = scan.index_tars(
                tars,
                out=place,
                layout=layout,
                classes=names,
                skip_damaged=skip_damaged,
                threads=threads,
                report=note,
                advance=bar.advance,
            )
        _tell({"samples taken": indexed.made.samples}, indexed.left_out, indexed.warnings, strict)
    with proposing("give another --out" if out else "give --out, a folder elsewhere", place):
        scan.save(indexed, warn)
    summarize("", indexed.made, "")


if __name__ == "__main__":
    imports.end()
    join_help_lines(main, sys.argv)
    try:
        config = (tyro.conf.FlagCreatePairsOff,)
        with plain_errors(sys.argv[1:], lambda: list_options(main, config)):
            tyro.cli(main, prog="python launch/pack.py", config=config)
    except (InputError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
