"""Tars that others made are indexed where they are."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
import pytest
import webdataset

from shards import index
from shards.digest import digest
from shards.errors import InputError
from shards.index import Index
from shards.making import scan
from shards.order import Order
from shards.reader import BlockReader
from shards.samples import Block, Layout
from shards.storage.skim import open_skim
from tests.helpers.ranges import serve
from tests.helpers.tars import make_index, scan_tars, write_tar
from tests.shards.making.test_pack import ignore

NO_IMAGE = "samples without an image, with fields {} (name the image's field with --image)"


def write_foreign(folder: Path, labels: list[int], per_shard: int = 50) -> str:
    """Shards by webdataset's own writer, each beginning and ending with something else."""
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(
        str(folder / "part-%04d.tar"), maxcount=per_shard + 2, verbose=0, mtime=0
    ) as writer:
        for i, label in enumerate(labels):
            if i % per_shard == 0:
                writer.write({"__key__": f"about{i}", "txt": "made by others"})
            content = bytes([i % 256]) * (1000 + i)
            writer.write({"__key__": f"img/{i:05d}", "jpg": content, "cls": label})
            if i % per_shard == per_shard - 1:
                writer.write({"__key__": f"end{i}", "json": {}})
    return str(folder)


@pytest.mark.parametrize("name", ["a::b", "a[1]", "a*", "a?b", "${WDS_A}", "a\\b", "a,b", "a#b%41"])
def test_only_braces_are_a_pattern(tmp_path: Path, name: str) -> None:
    write_foreign(tmp_path / "tars", [0, 1, 0], per_shard=2)
    (tmp_path / "tars").rename(tmp_path / name)
    for tars, samples in {"": [2, 1], "/part-000{0..1}.tar": [2, 1], "/part-0001.tar": [1]}.items():
        made = make_index(f"{tmp_path}/{name}{tars}")
        assert [shard.samples for shard in made.shards] == samples


@pytest.mark.parametrize("pattern", [False, True])
def test_foreign_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: bool) -> None:
    monkeypatch.setattr(index, "BLOCK_BYTES", 20_000)
    labels = [(7 * i) % 5 for i in range(130)]
    folder = write_foreign(tmp_path / "tars", labels)
    source = f"{folder}/part-{{0000..0002}}.tar" if pattern else folder
    left_out = scan_tars(source).left_out
    assert left_out == {
        NO_IMAGE.format("txt"): (3, "part-0000.tar: about0"),
        NO_IMAGE.format("json"): (2, "part-0000.tar: end49"),
    }
    made = make_index(source)
    found = index.load(folder, "data.train")
    assert found.digest == made.digest
    assert [shard.samples for shard in found.shards] == [50, 50, 30]
    assert found.classes == list("01234")
    seen = []
    for i in range(3):
        content = Path(found.shard_url(i)).read_bytes()
        assert len(found.blocks(i)) >= 3
        for b in range(len(found.blocks(i))):
            block = Block(content[slice(*found.block_range(i, b))])
            assert len(block) == found.blocks(i)[b, 1]
            seen += [(s.key, block.label(row)) for row, s in enumerate(block.samples)]
    assert seen == [(f"img/{i:05d}", label) for i, label in enumerate(labels)]
    Order(found, 0, 2, 10).batch_segments(0, 0)


def test_foreign_tars_in_an_object_store(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "tars", [i % 3 for i in range(60)])
    fsspec.filesystem("memory").put(folder, "/foreign", recursive=True)
    assert make_index("memory://foreign").digest == make_index(folder).digest


def test_tars_sorted_by_class_are_warned_about(tmp_path: Path) -> None:
    (warning,) = scan_tars(
        write_foreign(tmp_path / "sorted", [i // 25 for i in range(100)])
    ).warnings
    assert "sorted by class" in warning
    assert "repack" in warning
    mostly = (np.random.default_rng(0).random(100) < 0.1).astype(int).tolist()
    for name, labels in {"mostly": mostly, "one": [0] * 100}.items():
        assert scan_tars(write_foreign(tmp_path / name, labels)).warnings == []


def test_what_is_left_out_of_tars_is_told(tmp_path: Path) -> None:
    names = [
        *("a.jpg", "a.cls", "b.jpg", "b.cls", "c.jpg"),  # b's label is a name, c has none
        *("d.cls", "e.1.jpg", "e.2.jpg", "f.img", "f.json", "c.cls"),
        *("README", ".hidden.jpg", "._a.jpg"),
    ]
    contents = {name: b"1" if name == "a.cls" else b"bee" for name in names}
    write_tar(tmp_path / "tars" / "0.tar", contents, {"g.jpg": "a.jpg"})
    indexed = scan_tars(str(tmp_path / "tars"))
    assert indexed.made.samples == 3
    assert indexed.left_out == {
        "members without a field in their name": (3, "0.tar: README"),
        NO_IMAGE.format("cls"): (1, "0.tar: d"),
        "samples with several images and dots in their names (use --dotted if the dots belong to "
        "the names, or name the image's field with --image)": (1, "0.tar: e"),
        NO_IMAGE.format("img, json"): (1, "0.tar: f"),
        "samples whose image stands elsewhere in the tar "
        "(`python launch/pack.py SOURCE OUT` repacks them)": (1, "0.tar: c"),
        "samples whose image is a link or no plain file "
        "(`python launch/pack.py SOURCE OUT` repacks them)": (1, "0.tar: g"),
    }
    assert indexed.warnings == [
        "1 label is no class index as the others are, such as 'bee'",
        "2 of 3 samples have no label",
        "the labels begin at 1, and class 0 has no sample: are they counted from 1?",
    ]


def samples_of(made: Index) -> list[tuple[str, int]]:
    """All samples with their labels, as training reads them."""
    reader = BlockReader(index.load(made.url, "data.train"))
    blocks = [
        reader.fetch(shard, number)
        for shard in range(len(made.shards))
        for number in range(len(made.blocks(shard)))
    ]
    return [(s.key, block.label(row)) for block in blocks for row, s in enumerate(block.samples)]


@pytest.mark.parametrize(
    ("layout", "members", "samples", "classes"),
    [
        (Layout(), {"a.cls": "bee", "b.cls": "ant"}, [("a", 1), ("b", 0)], ["ant", "bee"]),
        (Layout(), {"a.cls": "1.0", "b.cls": "-1"}, [("a", 1), ("b", -1)], ["0", "1"]),
        (Layout(label="txt"), {"a.txt": "1", "b.txt": "0"}, [("a", 1), ("b", 0)], ["0", "1"]),
        (
            Layout(label="json:of.kind"),
            {"a.json": '{"of": {"kind": "bee"}}', "b.json": "{}"},
            [("a", 0), ("b", -1)],
            ["bee"],
        ),
        (Layout(), {"a.txt": "x", "b.txt": "y"}, [("a", -1), ("b", -1)], []),
    ],
)
def test_labels_of_all_kinds_reach_training(
    tmp_path: Path,
    layout: Layout,
    members: dict[str, str],
    samples: list[tuple[str, int]],
    classes: list[str],
) -> None:
    contents = {name: text.encode() for name, text in members.items()}
    contents |= {f"{name.partition('.')[0]}.jpg": b"photo" for name in members}
    write_tar(tmp_path / "0.tar", dict(sorted(contents.items())))
    indexed = scan_tars(str(tmp_path), layout=layout)
    scan.save(indexed, ignore)
    assert indexed.made.classes == classes
    assert samples_of(indexed.made) == samples


def test_missing_labels_are_told_with_the_fields_that_may_hold_them(tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", {"a.jpg": b"x", "a.json": b"{}", "a.txt": b"a cat"})
    (warning,) = scan_tars(str(tmp_path)).warnings
    for part in ("no labels", "--label json:KEY", "--label txt", "--classes-from tars"):
        assert part in warning


def test_names_of_classes_are_added_without_another_digest(tmp_path: Path) -> None:
    """A run goes on when its classes get names. Names that are labels decide what they mean."""
    folder = write_foreign(tmp_path / "tars", [0, 2, 1, 0])
    assert make_index(folder).digest == make_index(folder, ["ant", "bee", "cat"]).digest
    assert (
        make_index(folder, ["ant", "bee", "cat", "dog"]).digest
        != make_index(folder, ["a", "b", "c"]).digest
    )
    write_tar(tmp_path / "named" / "0.tar", {"a.jpg": b"x", "a.cls": b"ant"})
    named = [make_index(f"{tmp_path}/named", classes) for classes in (["ant", "b"], ["b", "ant"])]
    assert named[0].digest != named[1].digest


def test_tars_of_nested_folders_and_any_case(tmp_path: Path) -> None:
    one = {"a.jpg": b"x"}
    for name in ("b/2.TAR", "1.tar", "b/._2.tar", "@eaDir/3.tar", "z.tar.gz", "notes.txt"):
        write_tar(tmp_path / name, one)
    indexed = scan_tars(str(tmp_path))
    assert [shard.name for shard in indexed.made.shards] == ["1.tar", "b/2.TAR"]
    assert {reason: left.number for reason, left in indexed.left_out.items()} == {
        "hidden files and files of file managers": 2,
        "compressed tars, which `python launch/pack.py SOURCE OUT` repacks": 1,
        ".txt files": 1,
    }
    scan.save(indexed, ignore)
    assert len(samples_of(indexed.made)) == 2
    both = scan_tars(f"{tmp_path}/b/2.TAR", f"{tmp_path}/1.tar").made
    assert (both.url, [s.name for s in both.shards]) == (str(tmp_path), ["b/2.TAR", "1.tar"])
    write_tar(tmp_path / "split" / "train" / "1.tar", one)
    write_tar(tmp_path / "split" / "Val" / "1.tar", one)
    with pytest.raises(InputError, match="holds Val and train: index each alone"):
        scan_tars(f"{tmp_path}/split")


@pytest.mark.parametrize("spelling", ["file://{}", "{}/", "{}/../tars", "{}/../link"])
def test_the_same_place_in_other_spellings(tmp_path: Path, spelling: str) -> None:
    folder = write_foreign(tmp_path / "tars", [0, 1])
    (tmp_path / "link").symlink_to("tars")
    assert scan_tars(folder, out=spelling.format(folder)).made.base == ""


@pytest.mark.parametrize("source", ["../tars", "../tars/", "../link", "tars/../../tars", ".."])
def test_a_folder_is_read_by_any_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    write_foreign(tmp_path / "tars", [0, 1])
    write_foreign(tmp_path / "elsewhere", [2])
    (tmp_path / "tars" / "b").symlink_to("../elsewhere")
    (tmp_path / "link").symlink_to("tars")
    (tmp_path / "tars" / "tars").mkdir()
    here = tmp_path / "tars" / "tars" if source == ".." else tmp_path / "tars"
    monkeypatch.chdir(here)
    made = make_index(source)
    assert [shard.name for shard in made.shards] == ["b/part-0000.tar", "part-0000.tar"]
    assert len(samples_of(made)) == 3


def test_every_source_has_tars(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "tars", [0])
    (tmp_path / "none").mkdir()
    for name, reason in (("out", "no such folder$"), ("none", r"no \.tar files there$")):
        with pytest.raises(InputError, match=f"SOURCE {tmp_path}/{name}: {reason}"):
            scan_tars(folder, f"{tmp_path}/{name}")


def test_an_index_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_foreign(Path("tars"), [0, 1, 2])
    before = sorted(os.listdir("tars"))
    indexed = scan_tars("tars", out="out")
    scan.save(indexed, ignore)
    assert sorted(os.listdir("tars")) == before
    assert os.listdir("out") == [index.NAME]
    monkeypatch.chdir("/")
    assert len(samples_of(index.load(f"{tmp_path}/out", "data.train"))) == 3


def test_tars_over_http(tmp_path: Path) -> None:
    write_foreign(tmp_path / "tars", [0, 1, 2], per_shard=2)
    with serve(tmp_path) as url:
        with pytest.raises(InputError, match=r"nothing can be written over http: .* --out URL"):
            scan_tars(f"{url}/tars/part-{{0000..0001}}.tar")
        with pytest.raises(InputError, match="can't be listed over http"):
            scan_tars(f"{url}/tars")
        indexed = scan_tars(f"{url}/tars/part-{{0000..0001}}.tar", out=f"{tmp_path}/out")
        scan.save(indexed, ignore)
        assert [label for _, label in samples_of(indexed.made)] == [0, 1, 2]


def test_a_call_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_foreign(tmp_path / "tars", [0, 1, 2], per_shard=1)
    whole = Path(folder, "part-0001.tar").read_bytes()
    Path(folder, "part-0001.tar").write_bytes(whole[:600])
    with pytest.raises(InputError):
        scan_tars(folder)
    Path(folder, "part-0001.tar").write_bytes(whole)
    opened: list[str] = []

    def note(url: str) -> BinaryIO:
        opened.append(url)
        return open_skim(url)

    monkeypatch.setattr(scan, "open_skim", note)
    made = make_index(folder)
    assert [url.rpartition("/")[2] for url in opened] == ["part-0001.tar"]
    assert made.digest == make_index(folder).digest
    assert len(opened) == 4  # After the index was saved, nothing is left to go on from.


def test_damaged_records_of_a_stopped_call_count_as_none(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "tars", [0, 1, 2], per_shard=1)
    whole = Path(folder, "part-0001.tar").read_bytes()
    record = Path(folder, ".index", f"{digest('part-0000.tar')}.json")
    sound: dict[str, object] = {}
    for name, value in (
        *(("", None), ("labels", [5]), ("labels", [-1]), ("texts", [1]), ("layout", [])),
        *(("blocks", [[0, 2**60]]), ("left_out", []), ("left_out", {"a": 1}), ("fields", None)),
        *(("bytes", True), ("bytes", 1e400)),
    ):
        if name:
            record.write_text(json.dumps(sound | {name: value}))
        Path(folder, "part-0001.tar").write_bytes(whole[:600])
        with pytest.raises(InputError, match="part-0001"):
            scan_tars(folder)
        sound = sound or json.loads(record.read_text())
        assert json.loads(record.read_text()) == sound, (name, value)


def test_class_names(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "tars", [0, 2, 1, 0])
    assert make_index(folder, ["ant", "bee", "cat"]).classes == ["ant", "bee", "cat"]
    assert make_index(folder).classes == ["ant", "bee", "cat"]  # kept
    with pytest.raises(InputError, match=r"--classes names 2 classes, but \.cls goes up to 2"):
        make_index(folder, ["ant", "bee"])


def test_labels_that_are_no_class_indices(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "tars", [123456789, 1])
    with pytest.raises(InputError, match=r"label 123456789 of sample 1 of 2 is no class"):
        make_index(folder)


def test_damaged_tars_are_named(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "tars", [i % 3 for i in range(100)])
    path = Path(folder) / "part-0001.tar"
    whole = path.read_bytes()
    header = Block(whole).samples[20].start
    for damaged in (
        whole[:-20_000],
        whole[:header],
        b"",
        whole[:header] + b"?" + whole[header + 1 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"SOURCE .*part-0001\.tar: damaged: "):
            make_index(folder)
    with tarfile.open(path, "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("same.jpg"), io.BytesIO())
    with pytest.raises(InputError, match=r"part-0001\.tar: damaged: .*'same\.jpg' stands twice"):
        make_index(folder)


def test_all_damaged_tars_are_told_and_may_be_skipped(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "tars", [0, 1] * 5, per_shard=2)
    for name in ("part-0001.tar", "part-0003.tar"):
        path = Path(folder, name)
        path.write_bytes(path.read_bytes()[:5700])
    Path(folder, "part-0002.tar").unlink()
    source = f"{folder}/part-{{0000..0004}}.tar"
    told: list[str] = []
    with pytest.raises(InputError, match=r"3 of 5 tars are damaged.* --skip-damaged"):
        scan_tars(source, report=told.append)
    assert [line.partition(": ")[2].partition(":")[0] for line in told] == [
        "damaged",
        "not there (0 samples before that)",
        "damaged",
    ]
    indexed = scan_tars(source, skip_damaged=True)
    assert [shard.name for shard in indexed.made.shards] == ["part-0000.tar", "part-0004.tar"]
    assert indexed.left_out["damaged or missing tars, with at least 2 samples"].number == 3
    with pytest.raises(InputError, match=r"1 of 1 tars is damaged or missing: restore it$"):
        scan_tars(f"{folder}/part-0001.tar", skip_damaged=True)


def test_tars_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "a", [0, 1])
    for url in (f"{folder}/part-0009.tar", f"{folder}/part-000*.tar"):
        with pytest.raises(InputError, match=r"part-000.\.tar: not there"):
            make_index(url)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"none: no \.tar files there$"):
        make_index(f"{tmp_path}/none")
    for name in ("a.tar.zst", "a.tgz", "a.zip", "a.parquet"):
        with pytest.raises(InputError, match=r"is compressed, .*repack|file is not read: extract"):
            make_index(f"{tmp_path}/{name}")
    with pytest.raises(InputError, match="is named twice"):
        scan_tars(f"{folder}/part-0000.tar", f"{folder}/part-0000.tar")
    with pytest.raises(InputError, match="must lie in one bucket"):
        scan_tars("s3://a/1.tar", "s3://b/1.tar")
    write_tar(Path(folder) / "other.tar", {"notes.txt": b""})
    indexed = scan_tars(folder)
    assert len(indexed.made.shards) == 1
    assert indexed.left_out[NO_IMAGE.format("txt")] == (2, "other.tar: notes")
    with pytest.raises(InputError, match="no images in the tars there: samples without an image"):
        make_index(f"{folder}/other.tar")
