"""Find the images in tars that others made, to pack them anew in random order.

What an index cannot do with tars where they are is done here: links inside a tar are followed,
fields that stand apart come together, tars inside of tars and compressed tars are read, and the
class may be the tar or the folder of an image.
"""

import io
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from shards.errors import InputError
from shards.making.image_folders import EXTENSIONS, PATTERN_HINT
from shards.making.labels import number_labels
from shards.making.left_out import Reasons, explain, leave_out, merge
from shards.making.pack import Image, ImageSet, run_in_threads
from shards.making.scan import NOT_THERE
from shards.making.survey import ReadImage
from shards.making.tars import Tars, is_tar
from shards.making.unpack import unpack
from shards.samples import IMAGE_FIELDS, Layout, Sample, Span, group_samples, match_name
from shards.storage import files
from shards.storage.skim import open_skim
from shards.tar import Member, TarError, read_members

ClassesFrom = Literal["labels", "tars", "folders"]

_MOST_LINKS = 8  # A chain of more links than this is taken for a loop.


class Repacking(NamedTuple):
    """The images of tars, ready to be packed."""

    images: ImageSet
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
) -> Repacking:
    """Find the images in tars, with their labels.

    Raises InputError when there are none, and when tars are damaged unless `skip_damaged`.

    Args:
        classes_from: What gives an image's class: its label, the name of its tar, or the last
            folder in its path.
        classes: Names of the classes, or None.
        scratch: A local folder, into which compressed tars are unpacked.
        report: Takes a line for each tar that is unpacked or damaged.
    """
    left_out = dict(tars.left_out)

    def list_tar(number: int) -> tuple[list[_Found], Reasons] | str:
        name, reasons = tars.names[number], Reasons()
        url = files.join(tars.folder, name)
        shown = files.redact(url)
        try:
            if not name.lower().endswith(".tar"):
                report(f"unpacking {shown} to {scratch}")
                unpack(url, f"{scratch}/{number}.tar")
                url = f"{scratch}/{number}.tar"
            with open_skim(url) as file:
                return list(_list_images(file, url, name, layout, classes_from, reasons)), reasons
        except FileNotFoundError:
            return f"{shown}: {NOT_THERE}{PATTERN_HINT * bool(set(name) & set('*?'))}"
        except TarError as error:
            return f"{shown}: damaged: {error}"

    results = run_in_threads(list_tar, range(len(tars.names)), threads)
    damaged = [found for found in results if isinstance(found, str)]
    for line in damaged if skip_damaged or len(damaged) > 1 else []:
        report(line)
    if damaged and not skip_damaged:
        raise InputError(
            f"SOURCE {damaged[0]}: {len(damaged):,} of {len(tars.names):,} tars are damaged or "
            "missing: restore them, or leave them out with --skip-damaged"
        )
    for line in damaged:
        leave_out(left_out, "damaged or missing tars", line)
    found: list[_Found] = []
    for result in results:
        if not isinstance(result, str):
            found += result[0]
            merge(left_out, result[1])
    return _prepare(sorted(found), classes, left_out, f"SOURCE {files.redact(tars.folder)}")


def _prepare(
    found: list[_Found], classes: list[str] | None, left_out: Reasons, place: str
) -> Repacking:
    if not found:
        raise InputError(f"{place}: no images in the tars there{explain(left_out)}")
    labels = number_labels([image.label for image in found], classes, [], place)
    at = {image.path: image for image in found}

    def read(image: Image, start: int | None = None, stop: int | None = None) -> bytes:
        url, first, size = at[image.path][1:4]
        return files.read(url, first + (start or 0), first + (size if stop is None else stop))

    numbers = labels.numbers.tolist()
    images = [Image(f.path, f.size, number) for f, number in zip(found, numbers, strict=True)]
    warnings = list(labels.warnings)
    if missing := sum(number < 0 for number in numbers):
        warnings.append(f"{missing:,} of {len(numbers):,} samples have no label")
    return Repacking(ImageSet("", images, labels.classes), read, left_out, warnings)


def _list_images(
    file: BinaryIO,
    url: str,
    tar: str,
    layout: Layout,
    classes_from: ClassesFrom,
    left_out: Reasons,
) -> Iterator[_Found]:
    """Yield the images of a tar and of the tars inside of it."""
    by_name = {member.name: member for member in read_members(file, whole=True)}
    members = [_follow_link(member, by_name) for member in by_name.values()]
    for member in members:
        if is_tar(member.name) and member.size:
            part = cast(BinaryIO, _Part(file, member.content, member.size))
            inside = f"{tar}/{member.name}"
            for found in _list_images(part, url, inside, layout, classes_from, left_out):
                yield found._replace(start=member.content + found.start)
    for sample in _group(members, layout, tar, left_out):
        if image := _find_image(sample, layout):
            label = _read_class(file, sample, tar, layout, classes_from)
            path = f"{tar}/{sample.key}.{image[0]}"
            if path.rpartition(".")[2] not in EXTENSIONS:
                path += f".{IMAGE_FIELDS[0]}"  # Decoders look at the content alone.
            yield _Found(path, url, *image[1], label)
        elif sample.empty or any(not is_tar(f".{name}") for name in sample.fields):
            fields = ", ".join(sorted([*sample.fields, *sample.empty])[:5])
            reason = f"samples without an image, with fields {fields}"
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
    keyed: dict[str, list[Member]] = {}
    for member in members:
        if match := match_name(member.name, layout):
            keyed.setdefault(match[0], []).append(member)
        else:
            leave_out(left_out, "members without a field in their name", f"{tar}: {member.name}")
    apart = Counter(sample.key for sample in group_samples(members, layout))
    together: set[str] = set()
    for key, number in apart.items():
        if number > 1:
            (sample,) = group_samples(keyed[key], layout)
            if _find_image(sample, layout):
                together.add(key)
                yield sample
    yield from (s for s in group_samples(members, layout) if s.key not in together)


def _read_class(
    file: BinaryIO, sample: Sample, tar: str, layout: Layout, classes_from: ClassesFrom
) -> str:
    """Return the text of a sample's label, or the name of its class."""
    if classes_from == "tars":
        return tar.rpartition("/")[2].partition(".")[0]
    if classes_from == "folders":
        return sample.key.rpartition("/")[0].rpartition("/")[2]
    if sample.label is None:
        return ""
    file.seek(sample.label[0])
    return layout.read_label(file.read(sample.label[1]))


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


class _Part(io.RawIOBase):
    """A range of bytes of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._start + self._position)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
