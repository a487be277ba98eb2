"""Tar headers: the samples are those that webdataset and the standard library find."""

import io
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.tar import Block, TarError, parse_label, read_samples

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
        for s in read_samples(io.BytesIO(content), whole=True)
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
    texts = [b"7", b" 12\n", b"-1", b"cat", b"", b"1.5"]
    assert [parse_label(text) for text in texts] == [7, 12, -1, -1, -1, -1]


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
