"""Whatever is in a tar: every group of it is taken or told, as an independent reader finds them."""

import io
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import index
from shards.errors import InputError
from shards.making import scan
from shards.making.repack import find_packed_images
from shards.making.tars import find_tars
from shards.reader import BlockReader
from shards.samples import Layout
from tests.helpers.tars import scan_tars
from tests.shards.making.test_pack import ignore

Found = tuple[bytes, str]  # content of an image, name of its class or ""
Group = tuple[str, dict[str, bytes]]

FOLDERS, STEMS = ["", "d/", "./", "e.x/"], ["a", "b", "c"]
FIELDS = ["jpg", "jpg", "jpg", "cls", "cls", "JPG", "left.jpg", "right.jpg", "npy", "json"]
names = st.builds("{}{}.{}".format, *map(st.sampled_from, (FOLDERS, STEMS, FIELDS)))
names = st.one_of(
    names, names, names, st.sampled_from(["README", "d/notes", "._a.jpg", "./.h.jpg"])
)
texts = st.sampled_from([b"0", b"1", b"2.0\n", b"-1", b"", b"\xff", b"ant", b"\xef\xbb\xbfbee\r\n"])
kinds = st.sampled_from(
    [*[tarfile.REGTYPE] * 8, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
)
forms = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


members = st.lists(st.tuples(names, kinds, texts), max_size=14)
# Neighbors belong together more often when they are sorted.
members = st.one_of(members, members.map(lambda drawn: sorted(drawn, key=lambda m: m[0].lower())))


def write_members(path: Path, members: list[tuple[str, bytes, bytes]], form: int) -> None:
    with tarfile.open(path, mode="w", format=form) as archive:
        for number, (name, kind, text) in enumerate(members):
            content = text if name.endswith("cls") else b"%d" % number * 300
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg" * (kind == tarfile.SYMTYPE)
            info.size = len(content) * (kind == tarfile.REGTYPE)
            archive.addfile(info, io.BytesIO(content))


def group_by_webdataset(path: Path) -> list[Group]:
    """Raises ValueError when a sample has a field twice."""
    found = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [
        (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in found
    ]


def with_images(groups: list[Group]) -> list[tuple[str, bytes, bytes]]:
    """The key, image and label of the groups that have one image."""
    found = []
    for key, fields in groups:
        ending = [name for name in fields if re.search(r"(^|\.)jpg$", name)]
        ending = ["jpg"] if "jpg" in ending else ending
        if len(ending) == 1:
            found.append((key, fields[ending[0]], fields.get("cls", b"")))
    return found


def class_names(contents: list[bytes]) -> list[str]:
    """The names of the classes that labels stand for, by the rule in the README."""

    def text(content: bytes) -> str:
        try:
            return content.decode("utf-8-sig").strip().removesuffix(".0")
        except UnicodeDecodeError:
            return ""

    labels = [text(content) for content in contents]
    if any(label.isdigit() for label in labels):
        return [label if label.isdigit() else "" for label in labels]
    return ["" if label == "-1" else label for label in labels]


def read_back(url: str) -> list[tuple[str, bytes, str]]:
    """The key, image and class of all samples, as training reads them."""
    made = index.load(url, "data.train")
    reader, found = BlockReader(made), []
    for shard in range(len(made.shards)):
        for number in range(len(made.blocks(shard))):
            block = reader.fetch(shard, number)
            for row, sample in enumerate(block.samples):
                assert sample.image is not None
                start, size = sample.image
                label = block.label(row)
                name = made.classes[label] if label >= 0 else ""
                found.append((sample.key, bytes(block.content[start : start + size]), name))
    return found


@settings(max_examples=150, deadline=None)
@given(members, forms)
def test_every_group_is_taken_or_told(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, bytes, bytes]], form: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = folder / "0.tar"
    write_members(path, drawn, form)
    try:
        groups = group_by_webdataset(path)
    except ValueError:
        with pytest.raises(InputError, match="stands twice"):
            scan_tars(str(folder))
        return
    wanted = with_images(groups)
    labels = class_names([label for *_, label in wanted])
    if not wanted:
        with pytest.raises(InputError, match="no images in the tars there"):
            scan_tars(str(folder))
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "BLOCK_BYTES", 2000)
        indexed = scan_tars(str(folder))
    scan.save(indexed, ignore)
    assert read_back(str(folder)) == [
        (key, image, label) for (key, image, _), label in zip(wanted, labels, strict=True)
    ]
    told = {reason: left.number for reason, left in indexed.left_out.items()}
    others = sum(told.pop(reason, 0) for reason in list(told) if reason.startswith("members"))
    unusable = sum(told.pop(reason, 0) for reason in list(told) if reason.startswith("labels"))
    with tarfile.open(path) as archive:
        members = [member for member in archive if not member.isdir()]
    plain = [m for m in members if m.isreg()]
    has_field = re.compile(r"(.*/)?[^/.][^/.]*\.[^/]*")
    assert others == sum(not has_field.fullmatch(member.name) for member in members)
    assert unusable == sum(label == b"\xff" for *_, label in wanted)
    # Links are told with the group they belong to, or else as one of their own.
    assert len(groups) - len(wanted) <= sum(told.values())
    assert sum(told.values()) <= len(groups) - len(wanted) + len(members) - len(plain)
    once = max(Counter(key for key, _ in groups).values()) == 1
    if once and len(plain) == len(members):
        assert repack(folder) == Counter(
            (i, label) for (_, i, _), label in zip(wanted, labels, strict=True)
        )


def repack(folder: Path) -> Counter[Found]:
    found = find_packed_images(
        find_tars([str(folder)]),
        layout=Layout(),
        classes_from="labels",
        classes=None,
        skip_damaged=False,
        threads=1,
        scratch=str(folder),
        report=ignore,
    )
    (images,) = found.sets
    return Counter(
        (found.read(image), images.classes[image.label] if image.label >= 0 else "")
        for image in images.images
    )
