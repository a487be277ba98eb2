"""Tars of any kind are packed anew: what is in them, by which label, and how often."""

import builtins
import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import pack as pack_command
from shards import index
from shards.errors import InputError
from shards.making.repack import ClassesFrom, Repacking, find_packed_images
from shards.making.tars import find_tars
from shards.reader import BlockReader
from shards.samples import Layout
from shards.storage import files
from tests.conftest import draw_photo
from tests.helpers.tars import write_tar
from tests.shards.making.test_bit_depth import encode_values
from tests.shards.test_dimensions import encode


def find(tmp_path: Path, *sources: str, **options: Any) -> Repacking:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    plain: dict[str, Any] = {"layout": Layout(), "classes_from": "labels", "classes": None}
    return find_packed_images(
        find_tars(list(sources), compressed=True),
        **(plain | {"skip_damaged": False} | options),
        threads=2,
        scratch=f"{tmp_path}/scratch",
        report=lambda _: None,
    )


def contents(found: Repacking) -> dict[str, tuple[bytes, int]]:
    return {
        image.path: (found.read(image), image.label) for part in found.sets for image in part.images
    }


def test_links_and_fields_that_stand_apart(tmp_path: Path) -> None:
    members = {"d/a.jpg": b"A", "d/b.jpg": b"B", "c.jpg": b"C", "d/b.cls": b"1", "d/a.cls": b"0"}
    links = {"d/e.jpg": "a.jpg", "f.jpg": "d/e.jpg", "g.jpg": "g.jpg", "h.jpg": "../x.jpg"}
    write_tar(tmp_path / "0.tar", members, links)
    found = find(tmp_path, f"{tmp_path}/0.tar")
    assert contents(found) == {
        "0.tar/c.jpg": (b"C", -1),
        "0.tar/d/a.jpg": (b"A", 0),
        "0.tar/d/b.jpg": (b"B", 1),
        "0.tar/d/e.jpg": (b"A", -1),
        "0.tar/f.jpg": (b"A", -1),
    }
    assert found.left_out == {
        "samples whose image is no plain file, or a link that leads to none in the tar": (
            2,
            "0.tar: g",
        )
    }


@pytest.mark.parametrize(
    ("classes_from", "labels"), [("tars", [0, 1, 1]), ("folders", [1, 0, 2]), ("labels", [-1] * 3)]
)
def test_classes_of_tars_inside_of_a_tar(
    tmp_path: Path, classes_from: ClassesFrom, labels: list[int]
) -> None:
    inner = [
        write_tar(tmp_path / "n1.tar", {"bee/a.jpg": b"A"}),
        write_tar(tmp_path / "n2.tar", {"ant/b.JPEG": b"B", "x/cat/c.jpg": b"C"}),
    ]
    outer = {path.name: path.read_bytes() for path in inner}
    write_tar(tmp_path / "out" / "train.tar", outer | {"notes.txt": b""})
    found = find(tmp_path, f"{tmp_path}/out", classes_from=classes_from)
    names = ["n1.tar/bee/a.jpg", "n2.tar/ant/b.jpeg", "n2.tar/x/cat/c.jpg"]
    assert contents(found) == {
        f"train.tar/{name}": (content, label)
        for name, content, label in zip(names, (b"A", b"B", b"C"), labels, strict=True)
    }
    no_image = "samples without an image, with fields txt (name the image's field with --image)"
    assert found.left_out == {no_image: (1, "train.tar: notes")}


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".tar.gz", gzip.compress),
        (".tgz", gzip.compress),
        (".TAR.BZ2", bz2.compress),
        (".tar.xz", lzma.compress),
        (".tar.gz", bytes),  # not compressed, in spite of its name
    ],
)
def test_compressed_tars(tmp_path: Path, suffix: str, compress: Any) -> None:
    plain = write_tar(tmp_path / "p", {"a.jpg": b"A" * 5000, "a.cls": b"1"}).read_bytes()
    whole = compress(plain)
    path = tmp_path / f"in{suffix}"
    path.write_bytes(whole)
    found = find(tmp_path, str(path))
    assert list(contents(found).values()) == [(b"A" * 5000, 1)]
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged: "):
        find(tmp_path, str(path))


def test_damaged_and_missing_tars(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / "in" / f"{i}.tar", {"a.jpg": b"A"})
    (tmp_path / "in" / "1.tar").write_bytes(b"<html>")
    source = f"{tmp_path}/in/{{0..3}}.tar"
    with pytest.raises(InputError, match=r"1\.tar: damaged.*2 of 4 tars are.* --skip-damaged"):
        find(tmp_path, source)
    found = find(tmp_path, source, skip_damaged=True)
    assert len(found.sets[0].images) == 2
    assert found.left_out["damaged or missing tars"].number == 2
    with pytest.raises(InputError, match=r"no images in the tars there: .*fields psd"):
        find(tmp_path, str(write_tar(tmp_path / "gif.tar", {"a.psd": b""})))


def test_images_that_packing_converts(tmp_path: Path) -> None:
    wide = encode_values(np.arange(400, dtype=np.uint16).reshape(20, 20), "TIFF")
    members = {"a.tif": wide, "a.cls": b"0", "b.gif": encode(20, 20, "GIF"), "c.txt": b"no image"}
    members |= {"d.jpg": draw_photo(0, 20, 20), "d.tif": wide, "e.gif": b"1", "e.bmp": b"2"}
    write_tar(tmp_path / "0.tar", members)
    found = find(tmp_path, f"{tmp_path}/0.tar")
    assert list(contents(found)) == ["0.tar/a.tif", "0.tar/b.gif", "0.tar/d.jpg"]
    assert sum(left.number for left in found.left_out.values()) == 2
    source, out = f"{tmp_path}/0.tar", f"{tmp_path}/out"
    with pytest.raises(InputError, match=r"1 of its images, such as 0.tar/a.tif, have more than 8"):
        pack_command.main((source, out))
    pack_command.main((source, out), window=(0, 399))
    reader = BlockReader(index.load(out, "data.train"))
    shapes = [reader.decode(reader.fetch(0, 0), row).shape for row in range(3)]
    assert shapes == [(3, 20, 20)] * 3


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = {f"{i}.v1.img": draw_photo(i, 16, 16) for i in range(6)}
    labels = {f"{i}.v1.txt": b"ant" if i % 2 else b"bee" for i in range(6)}
    write_tar(tmp_path / "in" / "a.tar", photos | labels)
    write_tar(tmp_path / "in" / "b.tar", {"x.txt": b""})
    out = f"{tmp_path}/out"

    def run(**options: Any) -> None:
        pack_command.main((f"{tmp_path}/in", out), image="v1.img", label="v1.txt", **options)

    with pytest.raises(InputError, match=r"--strict: 1 was left out, see the table: no shards"):
        run(strict=True)
    assert not Path(out).exists()
    run()
    printed = capsys.readouterr()
    assert "6 images taken" in printed.err
    assert "1 left out: samples without an image, with fields txt (name the" in printed.err
    assert printed.out.startswith("6 samples, 2 classes")
    made = index.load(out, "data.train")
    block = BlockReader(made).fetch(0, 0)
    names = {s.key[9:]: made.classes[block.label(row)] for row, s in enumerate(block.samples)}
    assert names == {f"{i}_v1_img": ("ant" if i % 2 else "bee") for i in range(6)}


def test_splits_inside_of_a_tar_are_packed_apart(tmp_path: Path) -> None:
    members = {f"set/{split}/{name}/1.jpg": b"x" for split in ("train", "val") for name in "ab"}
    path = write_tar(tmp_path / "set.tar", members)
    found = find(tmp_path, str(path), classes_from="folders")
    assert {part.name: part.classes for part in found.sets} == {
        "train": ["a", "b"],
        "val": ["a", "b"],
    }
    write_tar(path, members | {"set/extra/a/1.jpg": b"x"})
    with pytest.raises(InputError, match=r"images of train and val, but also .*extra/a/1\.jpg"):
        find(tmp_path, str(path), classes_from="folders")


def test_names_of_tars_are_names(tmp_path: Path) -> None:
    """Also those that are numbers, and those with dots."""
    for name in ("2008", "st.bernard", "st.john"):
        write_tar(tmp_path / "in" / f"{name}.tar", {f"{name[-4:]}.jpg": b"x"})
    (images,) = find(tmp_path, f"{tmp_path}/in", classes_from="tars").sets
    assert images.classes == ["2008", "st.bernard", "st.john"]
    assert sorted(image.label for image in images.images) == [0, 1, 2]


def test_what_repacking_drops_is_told(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("a.jpg", b"old"), ("a.jpg", b"new"), ("a.JPG", b"other")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    path.write_bytes(path.read_bytes() + write_tar(tmp_path / "b", {"b.jpg": b"B"}).read_bytes())
    found = find(tmp_path, str(path))
    assert contents(found) == {"0.tar/a.jpg": (b"new", -1), "0.tar/b.jpg": (b"B", -1)}
    assert found.left_out == {
        "members that a later one of the same name replaces": (1, "0.tar: a.jpg"),
        "members whose name another one has in small or capital letters": (1, "0.tar: a.JPG"),
    }


def test_tars_in_tars_without_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", {"a.jpg": b"x"})
    for i in range(40):
        write_tar(path, {f"{i}.tar": path.read_bytes(), "a.jpg": b"x"})
    found = find(tmp_path, str(path))
    assert found.left_out["tars inside of more than 8 tars"].number == 1
    assert len(found.sets[0].images) == 9


def test_compressed_tars_by_content_and_their_damage(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "p", {"a.jpg": bytes(range(256)) * 99}).read_bytes()
    path = tmp_path / "0.tar"
    for compress in (gzip.compress, bz2.compress, lzma.compress):
        whole = compress(plain)
        path.write_bytes(whole)
        assert len(find(tmp_path, str(path)).sets[0].images) == 1
        for at in range(len(whole) // 2, len(whole) - 1, 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
            with pytest.raises(InputError, match=r"0\.tar: damaged: cannot be unpacked"):
                find(tmp_path, str(path))


def test_no_room_to_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress(write_tar(tmp_path / "p", {"a.jpg": b"x"}).read_bytes()))
    real = open

    def open_full(name: Any, *arguments: Any, **options: Any) -> Any:
        return real("/dev/full" if "scratch" in str(name) else name, *arguments, **options)

    monkeypatch.setattr(builtins, "open", open_full)
    with pytest.raises(InputError, match=r"no room to unpack it to .*: set TMPDIR to a folder"):
        find(tmp_path, str(path))


@pytest.mark.parametrize("out", ["in", "in/", "in/../in", "."])
def test_packing_never_replaces_the_tars_that_it_reads(tmp_path: Path, out: str) -> None:
    folder = "in/train" if out == "in/" else "." if out == "." else "in"
    write_tar(tmp_path / folder / "shard-000000.tar", {"a.jpg": draw_photo(0, 16, 16)})
    with pytest.raises(InputError, match="the tars of SOURCE lie there"):
        pack_command.main((f"{tmp_path}/{folder}", f"{tmp_path}/{out}"), overwrite=True)
    assert (tmp_path / folder / "shard-000000.tar").exists()


def test_out_may_not_lie_in_a_folder_of_tars(tmp_path: Path) -> None:
    """A second call would take the shards of the first one for tars to pack."""
    write_tar(tmp_path / "in" / "0.tar", {"a.jpg": draw_photo(0, 9, 9)})
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for out in (f"{tmp_path}/in/out", f"{tmp_path}/in/x/../y/z", f"{tmp_path}/link/out"):
        with pytest.raises(InputError, match=rf"^OUT {out}: lies in SOURCE {tmp_path}/in, and the"):
            pack_command.main((f"{tmp_path}/in", out))
    pack_command.main((f"{tmp_path}/in/0.tar", f"{tmp_path}/in/out"))
    pack_command.main((f"{tmp_path}/in", f"{tmp_path}/in2"))
    files.write("memory://tars-in/0.tar", (tmp_path / "in" / "0.tar").read_bytes())
    with pytest.raises(InputError, match=r"^OUT memory://tars-in/out: lies in SOURCE"):
        pack_command.main(("memory://tars-in", "memory://tars-in/out"))


@pytest.mark.parametrize(
    ("out", "told"),
    [
        (
            "/",
            "OUT /: is a whole disk, where shards would lie .*: give a folder there, such as /mi",
        ),
        ("s3://b/", "OUT s3://b/: is a whole bucket, .* such as s3://b/mine$"),
    ],
)
def test_out_may_not_be_a_whole_disk_or_bucket(tmp_path: Path, out: str, told: str) -> None:
    write_tar(tmp_path / "in" / "0.tar", {"a.jpg": draw_photo(0, 9, 9)})
    with pytest.raises(InputError, match=told):
        pack_command.main((f"{tmp_path}/in", out))
