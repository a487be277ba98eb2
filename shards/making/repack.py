"""Find the images in tars that others made, to pack them anew in random order.

What an index cannot do with tars where they are is done here: links inside a tar are followed,
fields that stand apart come together, tars inside of tars, compressed tars and parquet files are
read, and the class may be the tar or the folder of an image.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from threading import Event
from typing import BinaryIO, Literal, NamedTuple, cast

from shards.errors import InputError
from shards.making import parquet
from shards.making.image_folders import split_name
from shards.making.label_table import LabelTable
from shards.making.labels import number_labels
from shards.making.left_out import Reasons, explain, leave_out, merge, tell_each
from shards.making.listing import PATTERN_HINT
from shards.making.pack import Image, ImageSet
from shards.making.scan import NOT_THERE
from shards.making.scan_tar import NO_FIELD, explain_absence, read_label, until
from shards.making.survey import ReadImage
from shards.making.tars import Tars, check_is_file
from shards.making.unpack import PARQUET_MARK, find_compression, naming_temporary, unpack
from shards.samples import EXTENSIONS, IMAGE_FIELDS, Layout, Sample, Span, group_samples, match_name
from shards.storage import files
from shards.storage.range_file import RangeFile
from shards.storage.skim import open_skim
from shards.tar import COMPRESSED, Member, TarError, is_parquet, is_tar, read_members
from shards.threads import run_in_threads

ClassesFrom = Literal["labels", "tars", "folders", "none"]

_MOST_LINKS = 8  # A chain of more links than this is taken for a loop.
_MOST_TARS = 8  # Tars inside of so many tars are not read.
_NUMBERED = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")  # train-00000-of-00014, as on the Hub


_LINK = "samples whose image is no plain file, or a link that leads to none in the tar"
_REPLACED = "members that a later one of the same name replaces"
_ALIKE = "members whose name another one has in small or capital letters"


class Repacking(NamedTuple):
    """The images of tars, ready to be packed."""

    sets: list[ImageSet]  # one for each split, or one without a name
    read: ReadImage
    left_out: Reasons
    warnings: list[str]  # each of one line


class _Found(NamedTuple):
    """An image in a tar, or in a tar inside of it."""

    path: str  # unique in the source; ends in the image's extension
    url: str  # of the tar, or of its unpacked copy
    start: int  # byte offset
    size: int  # in bytes
    label: str  # the text of its label or the name of its class, "" when there is none


class _Listed(NamedTuple):
    """What a tar holds."""

    images: list[_Found]
    classes: list[str]  # what its labels' numbers stand for, where it says so
    left_out: Reasons


def find_packed_images(
    tars: Tars,
    *,
    layout: Layout,
    classes_from: ClassesFrom,
    classes: list[str] | None,
    skip_damaged: bool,
    threads: int,
    scratch: str,
    report: Callable[[str], None],
    table: LabelTable | None = None,
) -> Repacking:
    """Find the images in tars, with their labels.

    Raises InputError when there are none, and when tars are damaged unless `skip_damaged`.

    Args:
        layout: How members make samples. In parquet files its fields are columns.
        classes_from: What gives an image's class: its label, the name of its tar, the last folder
            in its path, or nothing.
        classes: Names of the classes, or None.
        scratch: A local folder, into which compressed tars and parquet files are unpacked.
        report: Takes a line for each tar that is unpacked or damaged.
        table: Names the classes of images.
    """
    left_out, stop = dict(tars.left_out), Event()

    def list_tar(number: int) -> _Listed | str:
        name = tars.names[number]
        url, path = files.join(tars.folder, name), f"{scratch}/{number}.tar"
        try:
            check_is_file(url)
            return _list_tar(url, name, path, layout, classes_from, report, stop)
        except FileNotFoundError:
            return f"{files.redact(url)}: {NOT_THERE}{PATTERN_HINT * bool(set(name) & set('*?'))}"
        except TarError as error:
            return f"{files.redact(url)}: damaged: {error}"

    results = run_in_threads(list_tar, range(len(tars.names)), threads, stop)
    damaged = [found for found in results if isinstance(found, str)]
    if skip_damaged or len(damaged) > 1:
        tell_each(damaged, report)
    if damaged and not skip_damaged:
        raise InputError(
            f"SOURCE {damaged[0]}: {len(damaged):,} of {len(tars.names):,} tars "
            f"{'is' if len(damaged) == 1 else 'are'} damaged or missing: restore "
            f"{'it' if len(damaged) == 1 else 'them'}, or use --skip-damaged"
        )
    if damaged:
        leave_out(left_out, "damaged or missing tars", damaged[0], len(damaged))
    listed = [found for found in results if not isinstance(found, str)]
    for one in listed:
        merge(left_out, one.left_out)
    place = f"SOURCE {files.redact(tars.folder)}"
    if classes is None and classes_from == "labels":
        classes = _agree([one.classes for one in listed if one.images], place)
    found = sorted(image for one in listed for image in one.images)
    return _prepare(found, classes_from, classes, table, left_out, place)


def _list_tar(
    url: str,
    name: str,
    path: str,
    layout: Layout,
    classes_from: ClassesFrom,
    report: Callable[[str], None],
    stop: Event,
) -> _Listed:
    """List the images of a tar, after it was unpacked to `path` where no parts of it can be read.

    Raises FileNotFoundError, TarError when it is damaged, and InputError when it cannot be
    unpacked.
    """
    reasons, classes = Reasons(), list[str]()
    with open_skim(url) as file:
        kind = find_compression(file)
    if kind:
        report(f"unpacking {files.redact(url)} to {posixpath.dirname(path)}")
        with naming_temporary(url, posixpath.dirname(path)):
            if kind == PARQUET_MARK:
                if classes_from == "folders":
                    raise InputError(
                        f"SOURCE {files.redact(url)}: --classes-from folders: a parquet file has "
                        "no folders: leave it out, or name the column by --label"
                    )
                classes = parquet.unpack(url, path, layout, reasons, name, stop)
                layout = Layout()
            else:
                unpack(url, path, stop)
        url = path
    with open_skim(url) as file:
        found = _list_images(file, url, name, layout, classes_from, reasons, stop)
        return _Listed(list(found), classes, reasons)


def _agree(names: list[list[str]], place: str) -> list[str] | None:
    """Return the names of the classes that all files agree on; None when they give none.

    Raises InputError when two files give other ones.
    """
    if odd := [one for one in names if one != names[0]]:
        raise InputError(
            f"{place}: its files have other classes than each other ({len(names[0]):,} and "
            f"{len(odd[0]):,} names): pack those of one data set, or give the names by --classes"
        )
    return (names[0] or None) if names else None


def _prepare(
    found: list[_Found],
    classes_from: ClassesFrom,
    classes: list[str] | None,
    table: LabelTable | None,
    left_out: Reasons,
    place: str,
) -> Repacking:
    if not found:
        raise InputError(f"{place}: no images in the tars there{explain(left_out)}")
    texts = [image.label for image in found]
    own = None if table else classes  # The names are those that the table gives.
    labels = number_labels(texts, own, [], place, as_names=classes_from != "labels")
    at = {image.path: image for image in found}

    def read(image: Image, start: int | None = None, stop: int | None = None) -> bytes:
        url, first, size = at[image.path][1:4]
        return files.read(url, first + (start or 0), first + (size if stop is None else stop))

    numbers = labels.numbers.tolist()
    images = [Image(f.path, f.size, number) for f, number in zip(found, numbers, strict=True)]
    sets = _part(images, labels.classes, place)
    if table:
        named = classes_from != "labels"
        sets, warnings = table.label(sets, left_out, named=named, inside=_leave_tars)
        return Repacking(sets, read, left_out, warnings)
    warnings = list(labels.warnings)
    missing = sum(number < 0 for number in numbers)
    if missing and classes_from != "none":
        hint = "; the folders may name the classes (--classes-from folders)"
        folders = [f.path.rpartition("/")[0] for f in found]
        nested = all("/" in folder and not is_parquet(folder) for folder in folders)
        hint *= missing == len(numbers) and nested and classes_from != "folders"
        warnings.append(f"{missing:,} of {len(numbers):,} samples have no label{hint}")
    return Repacking(sets, read, left_out, warnings)


def _leave_tars(path: str) -> str:
    """Return the path that an image has in its tar."""
    return "/".join(part for part in path.split("/") if not is_tar(part, compressed=True))


def _part(images: list[Image], classes: list[str], place: str) -> list[ImageSet]:
    """Part images whose folders or tars are splits. Raise InputError if others are among them."""
    splits: dict[str, list[Image]] = {}
    for image in images:
        splits.setdefault(_split(image.path), []).append(image)
    if len(splits) - ("" in splits) < 2:
        return [_make_set("", images, classes)]
    if others := splits.get(""):
        raise InputError(
            f"{place}: holds images of {' and '.join(name for name in splits if name)}, but also "
            f"{others[0].path}: extract the tars, and pack each split alone"
        )
    return [_make_set(name, part, classes) for name, part in splits.items()]


def _make_set(name: str, images: list[Image], classes: list[str]) -> ImageSet:
    """Make a data set, which has no classes when none of its images has a label."""
    return ImageSet(name, images, classes if any(image.label >= 0 for image in images) else [])


def _split(path: str) -> str:
    """Return the split that an image belongs to by the first folder or tar called so, or ""."""
    parts = (_without_suffix(part) for part in path.replace("\\", "/").split("/")[:-1])
    return next((name for part in parts if (name := split_name(part))), "")


def _without_suffix(tar: str) -> str:
    """Return what is left of a tar's name without its suffix, and its number among several."""
    for suffix in (".tar", *COMPRESSED):
        if tar.lower().endswith(suffix):
            return _NUMBERED.sub("", tar[: -len(suffix)])
    return tar


def _list_images(
    file: BinaryIO,
    url: str,
    tar: str,
    layout: Layout,
    classes_from: ClassesFrom,
    left_out: Reasons,
    stop: Event,
    depth: int = 0,
) -> Iterator[_Found]:
    """Yield the images of a tar and of the tars inside of it."""
    by_name: dict[str, Member] = {}
    for member in until(stop, read_members(file, whole=True)):
        if not member.name:
            where = f"{tar}: byte {member.start}"
            leave_out(left_out, "bytes after the end mark of a tar that are no tar", where)
            continue
        if member.name in by_name:
            leave_out(left_out, _REPLACED, f"{tar}: {member.name}")
        by_name[member.name] = member
    members = [_follow_link(member, by_name) for member in by_name.values()]
    for member in members:
        inside = f"{tar}/{member.name}"
        if is_tar(member.name) and depth == _MOST_TARS:
            leave_out(left_out, f"tars inside of more than {_MOST_TARS} tars", inside)
        elif is_tar(member.name) and member.size:
            part = _open_part(file, member.content, member.size)
            found = _list_images(part, url, inside, layout, classes_from, left_out, stop, depth + 1)
            try:
                for inner in found:
                    yield inner._replace(start=member.content + inner.start)
            except TarError as error:
                raise TarError(f"{member.name}: {error}") from None
    for sample in _group(members, layout, tar, left_out):
        if image := _find_image(sample, layout):
            label = _read_class(file, sample, tar, layout, classes_from, left_out)
            path = f"{tar}/{sample.key}.{image[0]}"
            if path.rpartition(".")[2] not in EXTENSIONS:
                path += f".{IMAGE_FIELDS[0]}"  # Decoders look at the content alone.
            yield _Found(path, url, *image[1], label)
        elif sample.empty or any(not is_tar(f".{name}") for name in sample.fields):
            linked = layout.image_field([*sample.fields, *sample.empty])
            reason = _LINK if sample.empty and linked else explain_absence(sample, layout)
            leave_out(left_out, reason, f"{tar}: {sample.key}")


def _find_image(sample: Sample, layout: Layout) -> tuple[str, Span] | None:
    """Return the field and the place of a sample's image.

    An image may have a form that training does not decode, because packing converts it.
    """
    if sample.image is not None:
        return sample.image_field, sample.image
    others = [name for name in sample.fields if name.rpartition(".")[2] in EXTENSIONS]
    return (others[0], sample.fields[others[0]]) if len(others) == 1 and not layout.image else None


def _group(members: list[Member], layout: Layout, tar: str, left_out: Reasons) -> Iterator[Sample]:
    """Group members into samples.

    Members that stand apart are one sample if that sample has one image.
    """
    members = list(_without_alike(members, layout, tar, left_out))
    keyed: dict[str, list[Member]] = {}
    for member in members:
        if match := match_name(member.name, layout):
            keyed.setdefault(match[0], []).append(member)
    apart = Counter(sample.key for sample in group_samples(members, layout))
    together: set[str] = set()
    for key, number in apart.items():
        if number > 1:
            (sample,) = group_samples(keyed[key], layout)
            if _find_image(sample, layout):
                together.add(key)
                yield sample
    yield from (s for s in group_samples(members, layout) if s.key not in together)


def _without_alike(
    members: Iterable[Member], layout: Layout, tar: str, left_out: Reasons
) -> Iterator[Member]:
    """Yield the members that have a field, and of those with one key and field only the first."""
    seen: set[tuple[str, str]] = set()
    for member in members:
        match = match_name(member.name, layout)
        if match is None or match in seen:
            leave_out(left_out, _ALIKE if match else NO_FIELD, f"{tar}: {member.name}")
        else:
            seen.add(match)
            yield member


def _read_class(
    file: BinaryIO,
    sample: Sample,
    tar: str,
    layout: Layout,
    classes_from: ClassesFrom,
    left_out: Reasons,
) -> str:
    """Return the text of a sample's label, or the name of its class; "" for none."""
    if classes_from == "none":
        return ""
    if classes_from == "tars":
        return _without_suffix(tar.rpartition("/")[2])
    if classes_from == "folders":
        # Tars that were made on Windows may have backslashes.
        folders = sample.key if "/" in sample.key else sample.key.replace("\\", "/")
        name = folders.rpartition("/")[0].rpartition("/")[2]
        return "" if name == "." else name
    return read_label(file, sample, layout, tar, left_out)


def _follow_link(member: Member, by_name: dict[str, Member]) -> Member:
    """Return a member with the content that its link leads to inside of the tar, if it does."""
    target = member
    for _ in range(_MOST_LINKS):
        if not target.link:
            return member._replace(content=target.content, size=target.size, link="")
        # A hard link gives a name in the tar, and a symbolic one a path from its own folder.
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(target.name), target.link))
        following = by_name.get(target.link) or by_name.get(beside)
        if following is None:
            break
        target = following
    return member


def _open_part(file: BinaryIO, start: int, size: int) -> BinaryIO:
    """Return `size` bytes of a file, from `start` on, as a file."""

    def read_range(first: int, stop: int) -> bytes:
        file.seek(start + first)
        return file.read(stop - first)

    return cast(BinaryIO, RangeFile(size, read_range))
