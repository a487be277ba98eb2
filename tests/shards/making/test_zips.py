"""Zip files are packed like folders, and whatever is odd in them is left out and told."""

import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pytest

from launch import pack as pack_command
from shards import index
from shards.errors import InputError
from shards.making import zips
from shards.making.image_folders import Found, make_sets
from shards.making.pack import Image
from shards.making.survey import ReadImage
from shards.making.tars import find_tars
from shards.making.zips import are_zips, list_zips
from shards.reader import BlockReader
from shards.storage import files
from tests.conftest import draw_photo
from tests.helpers.zips import write_zip

PHOTO = draw_photo(0, 20, 20)


def find(*sources: Path | str, by_zip: bool = False, skip: bool = False) -> tuple[Found, ReadImage]:
    found = find_tars([str(source) for source in sources], compressed=True)
    assert are_zips(found)
    listing, read = list_zips(found, by_zip=by_zip, skip_damaged=skip, threads=2)
    return make_sets(listing, "zips"), read


def name_classes(found: Found) -> dict[str, dict[str, str]]:
    return {
        part.name: {
            image.path: part.classes[image.label] if image.label >= 0 else ""
            for image in part.images
        }
        for part in found.sets
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1.jpg", "2.jpg"], {"": {"1.jpg": "", "2.jpg": ""}}),
        (["photos/1.jpg", "photos/2.jpg"], {"": {"1.jpg": "", "2.jpg": ""}}),
        (["p/ant/1.jpg", "p/bee/2.jpg"], {"": {"ant/1.jpg": "ant", "bee/2.jpg": "bee"}}),
        (
            ["p/q/train/ant/1.jpg", "p/q/train/bee/2.jpg", "p/q/val/bee/3.jpg", "p/notes.txt"],
            {
                "train": {"train/ant/1.jpg": "ant", "train/bee/2.jpg": "bee"},
                "val": {"val/bee/3.jpg": "bee"},
            },
        ),
        (["p/train/ant/1.jpg", "p/train/bee/"], {"train": {"train/ant/1.jpg": "ant"}}),
        (["p\\ant\\1.jpg", "p\\bee\\2.jpg"], {"": {"ant/1.jpg": "ant", "bee/2.jpg": "bee"}}),
        (["./ant/v1.0.jpg", "./ant/v1.1.jpg"], {"": {"v1.0.jpg": "", "v1.1.jpg": ""}}),
    ],
)
def test_folders_in_a_zip_file(
    tmp_path: Path, names: list[str], expected: dict[str, dict[str, str]]
) -> None:
    found, _ = find(write_zip(tmp_path / "a.zip", dict.fromkeys(names, b"x")))
    assert name_classes(found) == expected


def test_a_zip_file_gives_what_its_folder_gives(tmp_path: Path) -> None:
    photos = {f"{'ab'[i % 2]}/{i}.jpg": draw_photo(i, 20, 20) for i in range(8)}
    for name, content in photos.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    pack_command.main((f"{tmp_path}/in", f"{tmp_path}/one"))
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        source = write_zip(tmp_path / f"{method}.zip", photos, method)
        pack_command.main((str(source), f"{tmp_path}/{method}"))
        packed = index.load(f"{tmp_path}/{method}", "OUT")
        assert packed.digest == index.load(f"{tmp_path}/one", "OUT").digest
        assert (
            Path(packed.shard_url(0)).read_bytes()
            == Path(f"{tmp_path}/one/{packed.shards[0].name}").read_bytes()
        )


def test_several_zip_files(tmp_path: Path) -> None:
    for number in (1, 2):
        write_zip(tmp_path / "n" / f"i_{number:02}.zip", {f"images/{number}.jpg": b"x"})
    found, _ = find(f"{tmp_path}/n/i_{{01..02}}.zip")
    assert name_classes(found) == {"": {"1.jpg": "", "2.jpg": ""}}
    assert name_classes(find(tmp_path / "n")[0]) == name_classes(found)
    for name in ("ant", "bee"):
        write_zip(tmp_path / "c" / f"{name}.zip", {"1.jpg": b"x"})
    with pytest.raises(
        InputError, match=r"ant.zip: holds 1.jpg, and so does bee.zip: .* --classes"
    ):
        find(tmp_path / "c")
    found, _ = find(tmp_path / "c", by_zip=True)
    assert name_classes(found) == {"": {"ant/1.jpg": "ant", "bee/1.jpg": "bee"}}
    for name in ("Train", "val"):
        write_zip(
            tmp_path / "s" / f"{name}.zip", {f"{name}/a/1.jpg": b"x", f"{name}/b/2.jpg": b"x"}
        )
    found, _ = find(tmp_path / "s" / "Train.zip", tmp_path / "s" / "val.zip")
    assert {name: list(part.values()) for name, part in name_classes(found).items()} == {
        "train": ["a", "b"],
        "val": ["a", "b"],
    }


def test_zip_files_and_others_are_not_mixed(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"1.jpg": b"x"})
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds zip files and tars .* a.zip and b.tar: pack each"):
        find(tmp_path)


def test_a_folder_may_be_called_like_a_zip_file(tmp_path: Path) -> None:
    (tmp_path / "a.zip").mkdir()
    (tmp_path / "a.zip" / "1.jpg").write_bytes(PHOTO)
    pack_command.main((f"{tmp_path}/a.zip", f"{tmp_path}/out"))
    assert index.load(f"{tmp_path}/out", "OUT").samples == 1


def test_what_is_odd_is_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1.jpg", "b/2.jpg", "/c/3.jpg", "d/../../4.jpg", "C:\\e\\5.jpg"):
            archive.writestr(name, b"x")
        for name in ("__MACOSX/a/._1.jpg", "a/.DS_Store", "a/notes.txt", "a/inner.tar", "a/x.heic"):
            archive.writestr(name, b"x")
        link = zipfile.ZipInfo("a/6.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "1.jpg")
        archive.writestr("a/7.jpg", b"x", zipfile.ZIP_LZMA)
        archive.writestr("empty/", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("b/2.jpg", b"second")
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2")
    content[at + 8] |= 1  # the first entry says that it is encrypted
    path.write_bytes(content)
    found, read = find(path)
    assert name_classes(found) == {"": {"2.jpg": ""}}
    assert read(found.sets[0].images[0]) == b"second"
    outside = "entries whose name leads out of the zip file"
    assert {reason: (left.number, left.example) for reason, left in found.left_out.items()} == {
        "encrypted entries (extract them with the password, and pack the folder)": (
            1,
            "a.zip/a/1.jpg",
        ),
        outside: (3, "a.zip//c/3.jpg"),
        "hidden files and files of file managers": (2, "a.zip/__MACOSX/a/._1.jpg"),
        ".txt files": (1, "a.zip/a/notes.txt"),
        ".tar files": (1, "a.zip/a/inner.tar"),
        ".heic files": (1, "a.zip/a/x.heic"),
        "links in a zip file": (1, "a.zip/a/6.jpg"),
        "entries that are not compressed by deflate (extract them, and pack the folder)": (
            1,
            "a.zip/a/7.jpg",
        ),
        "entries that a later one of the same name replaces": (1, "a.zip/b/2.jpg"),
    }


def test_empty_folders_are_classes_where_images_lie(tmp_path: Path) -> None:
    names = ["p/a/1.jpg", "p/b/2.jpg", "p/empty/", "p/.hidden/", "q/r/", "q/", "/s/"]
    found, _ = find(write_zip(tmp_path / "a.zip", dict.fromkeys(names, b"")))
    assert found.sets[0].classes == ["a", "b", "empty"]
    assert found.warnings == ["classes without an image: empty"]


def test_names_in_other_encodings(tmp_path: Path) -> None:
    """macOS writes UTF-8 without saying so, and DOS its code page."""
    path = write_zip(tmp_path / "a.zip", {"caf__/1.jpg": b"x", "th_/2.jpg": b"x", "c/3.jpg": b"x"})
    content = path.read_bytes().replace(b"caf__", "caf\u00e9".encode())
    path.write_bytes(content.replace(b"th_", b"th\x82"))
    found, read = find(path)
    assert found.sets[0].classes == ["c", "caf\u00e9", "th\u00e9"]
    assert [read(image) for image in found.sets[0].images] == [b"x"] * 3


def test_damaged_entries(tmp_path: Path) -> None:
    photos = {f"{i}.jpg": draw_photo(i, 20, 20) for i in range(4)}
    path = write_zip(tmp_path / "a.zip", photos, zipfile.ZIP_STORED)
    content = path.read_bytes()
    path.write_bytes(content.replace(photos["2.jpg"], photos["2.jpg"][:-1] + b"?"))
    out = f"{tmp_path}/out"
    with pytest.raises(InputError, match=r"a.zip: its entry 2.jpg is damaged \(Bad CRC-32.*--skip"):
        pack_command.main((str(path), out))
    pack_command.main((str(path), f"{tmp_path}/some"), skip_damaged=True)
    assert index.load(f"{tmp_path}/some", "OUT").samples == 3
    path.write_bytes(content)
    pack_command.main((str(path), out))  # goes on
    assert index.load(out, "OUT").samples == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda _: b"<html>",
        lambda _: b"",
        lambda content: content.replace(b"PK\1\2", b"PK\1\3", 1),
    ],
)
def test_damaged_and_missing_zip_files(tmp_path: Path, damage: Any) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.jpg": PHOTO, "2.jpg": PHOTO})
    write_zip(tmp_path / "b.zip", {"3.jpg": PHOTO})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"^SOURCE .*/a.zip: damaged: .*--skip-damaged$"):
        find(tmp_path)
    found, _ = find(f"{tmp_path}/{{a,b,c}}.zip", skip=True)
    assert list(name_classes(found)[""]) == ["3.jpg"]
    assert found.left_out["damaged or missing zip files"].number == 2
    with pytest.raises(InputError, match=r"^SOURCE .*c.zip: no such file$"):
        find(f"{tmp_path}/c.zip")


def test_bytes_that_several_entries_claim(tmp_path: Path) -> None:
    """A zip bomb lets thousands of names share the bytes of one entry."""
    path = write_zip(tmp_path / "a.zip", {f"{i}.jpg": b"0" * 10**6 for i in range(3)})
    with zipfile.ZipFile(path) as archive:
        infos, start = archive.infolist(), archive.start_dir
        content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2", start + 1)
    content[at + 42 : at + 46] = struct.pack(
        "<I", 0
    )  # the second entry begins where the first does
    at = content.index(b"PK\1\2", at + 1)
    content[at + 20 : at + 24] = struct.pack("<I", infos[2].compress_size + 10**5)
    path.write_bytes(content)
    found, _ = find(path)
    assert [image.path for image in found.sets[0].images] == ["0.jpg"]
    (left,) = found.left_out.values()
    assert left.number == 2


def test_bytes_that_no_entry_has_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["1.jpg", "gone.jpg", "2.jpg"]
    path = write_zip(tmp_path / "a.zip", dict.fromkeys(names, PHOTO * 999), zipfile.ZIP_STORED)
    content = path.read_bytes()
    at = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)
    entry = content[at : content.index(b"PK\1\2", at + 1)]
    end = bytearray(content[content.index(b"PK\5\6") :])
    end[8:16] = struct.pack("<HHI", 2, 2, struct.unpack("<I", end[12:16])[0] - len(entry))
    path.write_bytes(content[: content.index(b"PK\5\6")].replace(entry, b"") + end)
    found, read = find(path)
    ranges: list[tuple[int, int]] = []
    whole = files.read

    def watch(url: str, start: int, stop: int) -> bytes:
        ranges.append((start, stop))
        return whole(url, start, stop)

    monkeypatch.setattr(files, "read", watch)
    assert [read(image) for image in found.sets[0].images] == [PHOTO * 999] * 2
    assert max(stop - start for start, stop in ranges) <= len(PHOTO) * 999 + 2**17 + 30


def test_entries_that_claim_more_or_less_than_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.jpg": b"0" * 10**6, "2.jpg": b"x"})
    monkeypatch.setattr(zips, "MOST_BYTES", 10**6 - 1)
    found, _ = find(path)
    assert [image.path for image in found.sets[0].images] == ["2.jpg"]
    monkeypatch.undo()
    sound = path.read_bytes()
    for size in (10, 10**6 + 1):
        content = bytearray(sound)
        at = content.index(b"PK\1\2")
        content[at + 24 : at + 28] = struct.pack("<I", size)
        path.write_bytes(content)
        found, read = find(path)
        with pytest.raises(InputError, match=r"its entry 1\.jpg is damaged"):
            read(found.sets[0].images[0])


def test_parts_of_an_image(tmp_path: Path) -> None:
    found, read = find(write_zip(tmp_path / "a.zip", {"1.jpg": PHOTO}))
    image = found.sets[0].images[0]
    assert read(image, 5, 9) == PHOTO[5:9]
    assert read(image, 5) == PHOTO[5:]
    assert read(Image(image.path, 0, -1)) == PHOTO


def test_a_zip_file_of_a_store_behind_other_bytes(tmp_path: Path) -> None:
    """A self-extracting archive has a program before its entries."""
    path = write_zip(tmp_path / "a.zip", {"a/1.jpg": PHOTO, "b/2.jpg": PHOTO})
    fsspec.filesystem("memory").pipe_file("/zips/a.zip", b"MZ" * 999 + path.read_bytes())
    pack_command.main(("memory://zips/a.zip", "memory://zips-out"))
    packed = index.load("memory://zips-out", "OUT")
    assert (packed.samples, packed.classes) == (2, ["a", "b"])
    reader = BlockReader(packed)
    assert reader.decode(reader.fetch(0, 0), 0).shape == (3, 20, 20)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_zip(tmp_path / "in" / "a.zip", {"p/a/1.jpg": PHOTO, "p/b/2.jpg": PHOTO})
    pack_command.main((f"{tmp_path}/in", f"{tmp_path}/out"))
    pack_command.main((str(path), f"{tmp_path}/out"))
    assert "already packed: 2 samples, 2 classes" in capsys.readouterr().out
    pack_command.main((str(path), f"{tmp_path}/none"), classes_from="none")
    assert index.load(f"{tmp_path}/none", "OUT").classes == []
    pack_command.main((str(path), str(tmp_path / "in")))  # beside it
    for options in ({"image": "jpg"}, {"classes_from": "folders"}, {"label": "txt"}):
        with pytest.raises(InputError, match="zip files are packed like folders"):
            pack_command.main((str(path), f"{tmp_path}/x"), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a.zip: is compressed.*repack it"):
        pack_command.main((str(path),), index_only=True)
    write_zip(path, {"a.txt": b"", "b.tar": b""})
    with pytest.raises(InputError, match=r"there: \.txt files .*; extract a\.zip/b\.tar, and"):
        pack_command.main((str(path), f"{tmp_path}/x"))


def test_zip_files_beside_images_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_zip(tmp_path / "in" / "more.zip", {"1.jpg": PHOTO})
    (tmp_path / "in" / "1.jpg").write_bytes(PHOTO)
    pack_command.main((f"{tmp_path}/in", f"{tmp_path}/out"))
    told = capsys.readouterr().err
    assert "warning: more.zip is a zip file, whose images are not taken: give the zip files" in told


def test_names_are_no_patterns(tmp_path: Path) -> None:
    names = ["[ab]*/{1}?.jpg", "c #%20/a::b.jpg"]
    path = write_zip(tmp_path / "a {1,2} [x]*?#%41.zip", dict.fromkeys(names, PHOTO))
    write_zip(tmp_path / "a 1 [x]*?#%41.zip", {"other.jpg": PHOTO})
    found, _ = find(path)
    assert name_classes(found) == {"": {name: name.partition("/")[0] for name in names}}
    pack_command.main((str(path), f"{tmp_path}/out"))
    assert index.load(f"{tmp_path}/out", "OUT").samples == 2
