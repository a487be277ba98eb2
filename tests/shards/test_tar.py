"""Tar headers: the samples are those that webdataset and the standard library find."""

import io
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.samples import Block, Layout, group_samples, parse_index, read_samples
from shards.tar import TarError, read_members

MEMBERS = [
    ("README", b"first"),
    ("a/0001.cls", b"3"),
    ("a/0001.JPG", b"x" * 700),
    ("a/0001.meta.json", b"{}"),
    ("a/0002.json", b"{}"),
    ("a/0003.png", b""),
    ("b.c/0003.png", b"y" * 512),
    ("b.c/0003.cls", b" 12\n"),
]


def make_tar(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def by_webdataset(content: bytes, tmp_path: str) -> list[tuple[str, dict[str, bytes]]]:
    with open(tmp_path, "wb") as file:
        file.write(content)
    found = webdataset.WebDataset(tmp_path, shardshuffle=False, empty_check=False)
    return [
        (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in found
    ]


def by_us(content: bytes) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (s.key, {name: content[at : at + size] for name, (at, size) in s.fields.items()})
        for s in group_samples(read_members(io.BytesIO(content), whole=True), Layout())
    ]


FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_those_of_webdataset(
    form: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    long = [("deep/" * 25 + "n" * 90 + ".jpg", b"long"), ("\u00e9t\u00e9.jpg", b"accent")]
    content = make_tar(MEMBERS + (long if form != tarfile.USTAR_FORMAT else long[1:]), form)
    path = str(tmp_path_factory.mktemp("tar") / "t.tar")
    assert by_us(content) == by_webdataset(content, path)


names = st.from_regex(r"[ab/.]{0,3}[ab]\.(jpg|cls|a\.JPG)", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, st.binary(max_size=600)), max_size=8))
def test_grouping_by_random_names(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes]]
) -> None:
    members = [(n.strip("/").replace("//", "/"), c) for n, c in members]
    members = [(n, c) for n, c in members if not any(p.startswith(".") for p in n.split("/"))]
    content = make_tar(members)
    path = str(tmp_path_factory.getbasetemp() / "random.tar")
    try:
        ours = by_us(content)
    except TarError:
        with pytest.raises(ValueError, match="duplicate"):
            by_webdataset(content, path)
    else:
        assert ours == by_webdataset(content, path)


def test_every_sample_start_begins_a_readable_piece() -> None:
    long = [("deep/" * 25 + "n" * 90 + ".jpg", b"long"), ("z.jpg", b"z")]
    content = make_tar(MEMBERS + long, tarfile.PAX_FORMAT)
    samples = list(read_samples(io.BytesIO(content)))
    for i, sample in enumerate(samples):
        keys = [s.key for s in read_samples(io.BytesIO(content[sample.start :]))]
        assert keys == [s.key for s in samples[i:]]


def test_block_keeps_samples_with_an_image() -> None:
    block = Block(make_tar(MEMBERS))
    assert [sample.key for sample in block.samples] == ["a/0001", "a/0003", "b.c/0003"]
    assert [block.label(i) for i in range(3)] == [3, -1, 12]


def test_labels() -> None:
    texts = ["7", "012", "3.0", "-1", "", "cat", "1.5", "1_0", "nan", "1e3", "9" * 30]
    numbers = [7, 12, 3, -1, -1, *[None] * 6]
    assert [parse_index(text) for text in texts] == numbers


@pytest.mark.parametrize(
    ("label", "content", "text"),
    [
        ("", b" 12\n", "12"),
        ("", b"\xff\xfe", ""),
        ("txt", b"ant\n", "ant"),
        ("json:a.b", b'{"a": {"b": "bee"}}', "bee"),
        ("json:a", b'{"a": 3}', "3"),
        ("json:a", b'{"a": [3]}', ""),
        ("json:a", b'{"a": true}', ""),
        ("json:a", b'{"b": 3}', ""),
        ("json:a", b"[" * 100_000, ""),
        ("json:a", b"no json", ""),
        ("", b"\xef\xbb\xbfant\r\n", "ant"),
        ("", b"x" * 1001, ""),
        ("json:a", b'{"a": 1}' + b" " * (1 << 20), ""),
        ("json:0.a", b'[{"a": 3}]', "3"),
        ("json:a.1", b'{"a": [3]}', ""),
    ],
)
def test_label_fields(label: str, content: bytes, text: str) -> None:
    assert Layout(label=label).read_label(content) == text


@pytest.mark.parametrize(
    ("layout", "names", "image", "label"),
    [
        (Layout(), "a.jpg a.cls", "a.jpg", "a.cls"),
        (Layout(), "a.input.jpg a.cls", "a.input.jpg", "a.cls"),
        (Layout(), "a.5.jpg a.5.cls a.txt", "a.5.jpg", "a.5.cls"),
        (Layout(), "a.input.jpg a.mask.png a.cls", None, None),
        (Layout(image="mask.png"), "a.input.jpg a.mask.png a.cls", "a.mask.png", "a.cls"),
        (Layout(image="img"), "a.img a.cls", "a.img", "a.cls"),
        (Layout(), "a.img a.cls", None, None),
        (Layout(label="txt"), "a.jpg a.cls a.txt", "a.jpg", "a.txt"),
        (Layout(label="json:x"), "a.jpg a.json", "a.jpg", "a.json"),
        (Layout(dotted=True), "v1.0.7.jpg v1.0.7.cls", "v1.0.7.jpg", "v1.0.7.cls"),
        (Layout(), "a.jpg a.jfif", "a.jpg", None),
    ],
)
def test_layouts(layout: Layout, names: str, image: str | None, label: str | None) -> None:
    content = make_tar([(name, name.encode()) for name in names.split()])
    (sample,) = read_samples(io.BytesIO(content), layout)
    for span, name in ((sample.image, image), (sample.label, label)):
        found = None if span is None else content[span[0] : sum(span)].decode()
        assert found == name


def test_dots_that_belong_to_names() -> None:
    names = [f"22.{i}.{name}" for i in range(3) for name in ("jpg", "cls")]
    content = make_tar([(name, b"1") for name in names])
    assert [s.image for s in read_samples(io.BytesIO(content))] == [None]
    found = read_samples(io.BytesIO(content), Layout(dotted=True))
    assert [s.key for s in found] == ["22.0", "22.1", "22.2"]


def test_links_and_special_members() -> None:
    """Each kind as the standard library sees it: only files and sizes of files take room."""
    buffer = io.BytesIO()
    kinds = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for i, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"long{'x' * 120}/{i}.jpg")
            info.type, info.linkname, info.size = kind, "to/" * 50 + "0.jpg", 700 * (i % 2)
            archive.addfile(info)
        info = tarfile.TarInfo("after.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"end"))
    members = list(read_members(io.BytesIO(buffer.getvalue()), whole=True))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        theirs = [(m.name, m.linkname if m.islnk() or m.issym() else "") for m in archive]
    assert [(m.name, m.link) for m in members] == theirs
    assert [m.special for m in members] == [False, False, True, True, False]
    assert buffer.getvalue()[members[-1].content :][:3] == b"end"
    (sample,) = [s for s in read_samples(buffer) if s.image]
    assert sample.key == "after"


def test_duplicate_field() -> None:
    content = make_tar([("a.jpg", b"1"), ("a.JPG", b"2")])
    with pytest.raises(TarError, match=r"'a\.JPG' stands twice"):
        by_us(content)


def test_damage_is_never_taken_for_the_end() -> None:
    content = make_tar(MEMBERS)
    whole = by_us(content)
    starts = [sample.start for sample in read_samples(io.BytesIO(content))]
    for at in starts:
        broken = bytearray(content)
        broken[at + 3] ^= 0x55
        with pytest.raises(TarError, match=f"byte {at}"):
            by_us(bytes(broken))
    for length in range(0, len(content) - 10_240, 256):
        with pytest.raises(TarError):
            by_us(content[:length])
    assert by_us(content[: len(content) - 1024]) == whole  # padding after the end mark


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_what_stands_after_an_end_mark() -> None:
    one, two = make_tar([("a.jpg", b"1")]), make_tar([("b.jpg", b"2")])
    members = list(read_members(io.BytesIO(one + two), whole=True))
    assert [(m.name, m.beyond) for m in members] == [("a.jpg", False), ("b.jpg", True)]
    assert [m.name for m in read_members(io.BytesIO(one + two))] == ["a.jpg"]
    members = list(read_members(io.BytesIO(one + b"junk" * 200), whole=True))
    assert [(m.name, m.size) for m in members] == [("a.jpg", 1), ("", 800)]
    with pytest.raises(TarError, match="without the end mark"):
        list(read_members(io.BytesIO(one + header("b.jpg", 0)), whole=True))


def test_the_rest_of_a_sparse_map_is_no_header() -> None:
    """An old GNU sparse file whose map goes on in two more blocks."""
    first = bytearray(header("s.jpg", 3, tarfile.GNUTYPE_SPARSE))
    first[482] = 1
    first[148:156] = b"%06o\0 " % (sum(first) - sum(first[148:156]) + 8 * 32)
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    content = bytes(first) + maps + b"end".ljust(512, b"\0") + make_tar([("a.jpg", b"1")])
    members = list(read_members(io.BytesIO(content), whole=True))
    assert [(m.name, m.special) for m in members] == [("s.jpg", True), ("a.jpg", False)]
    assert content[members[0].content :][:3] == b"end"


def test_names_that_are_no_text_stay_different() -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as archive:
        for name in ("\xe9.jpg", "\xe8.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    assert [m.name for m in read_members(buffer)] == ["\\xe9.jpg", "\\xe8.jpg"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_names_of_gigabytes_are_not_read(kind: bytes) -> None:
    class Endless(io.BytesIO):
        def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
            return 1 << 40 if whence == io.SEEK_END else super().seek(offset, whence)

    with pytest.raises(TarError, match="claims 2,147,483,648 bytes for a name"):
        list(read_members(Endless(header("x", 2 << 30, kind))))


def test_sums_of_signed_bytes() -> None:
    """Some old programs took the bytes of a header for signed ones when they summed them."""
    block = bytearray(header("\u00e9.jpg", 0))
    rest = sum(block) - sum(block[148:156]) + 8 * 32
    block[148:156] = b"%06o\0 " % (rest - 256 * sum(byte > 127 for byte in block))
    (member,) = read_members(io.BytesIO(bytes(block) + bytes(1024)))
    assert member.name == "\u00e9.jpg"
    block[3] ^= 1
    with pytest.raises(TarError):
        list(read_members(io.BytesIO(bytes(block))))
