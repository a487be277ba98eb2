"""Tars that others made are indexed where they are."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset

from shards import index
from shards.errors import InputError
from shards.index import Index
from shards.making import scan
from shards.order import Order
from shards.tar import Block
from tests.shards.making.test_pack import ignore


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


def make_index(
    source: str, classes: list[str] | None = None, report: Callable[[str], None] = ignore
) -> Index:
    return scan.index_tars(source, classes=classes, threads=2, report=report)


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
    warnings: list[str] = []
    source = f"{folder}/part-{{0000..0002}}.tar" if pattern else folder
    made = make_index(source, report=warnings.append)
    assert warnings == [
        "3 samples left out, whose only fields are txt, such as part-0000.tar: about0",
        "2 samples left out, whose only fields are json, such as part-0000.tar: end49",
    ]
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
    warnings: list[str] = []

    def note(text: str) -> None:
        if "left out" not in text:
            warnings.append(text)

    make_index(write_foreign(tmp_path / "sorted", [i // 25 for i in range(100)]), report=note)
    assert len(warnings) == 1
    assert "sorted by class" in warnings[0]
    assert "repack" in warnings[0]
    rng = np.random.default_rng(0)
    make_index(
        write_foreign(tmp_path / "mostly", (rng.random(100) < 0.1).astype(int).tolist()),
        report=note,
    )
    make_index(write_foreign(tmp_path / "one", [0] * 100), report=note)
    assert len(warnings) == 1


def test_what_is_left_out_of_tars_is_told(tmp_path: Path) -> None:
    names = [
        *("a.jpg", "a.cls", "b.jpg", "b.cls", "c.jpg"),  # b's label is a name, c has none
        *("2.0.jpg", "2.0.cls", "2.1.jpg"),  # one sample "2" for WebDataset
        *("d.cls", "e.input.img", "f.img", "f.json"),
    ]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as archive:
        for name in names:
            content = b"1" if name == "a.cls" else b"bee"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    told: list[str] = []
    made = make_index(str(tmp_path / "tars"), report=told.append)
    assert made.samples == 3
    assert told == [
        "1 sample left out, because a field is all that follows the first dot: take dots out of "
        "names, such as 0.tar: 2",
        "1 sample left out, whose only fields are cls, such as 0.tar: d",
        "1 sample left out, whose only fields are img, such as 0.tar: e",
        "1 sample left out, whose only fields are img, json, such as 0.tar: f",
        "1 sample without a label, as .cls is no class index, such as 0.tar: b",
        "2 of 3 samples have no label",
    ]


def test_class_names(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "tars", [0, 2, 1, 0])
    assert make_index(folder, ["ant", "bee", "cat"]).classes == ["ant", "bee", "cat"]
    assert make_index(folder).classes == ["ant", "bee", "cat"]  # kept
    with pytest.raises(InputError, match=r"--classes names 2 classes, but \.cls goes up to 2"):
        make_index(folder, ["ant", "bee"])


def test_labels_that_are_no_class_indices(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "tars", [123456789, 1])
    with pytest.raises(InputError, match=r"\.cls 123456789 is no class index"):
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


def test_tars_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "a", [0, 1])
    write_foreign(tmp_path / "b", [0, 1])
    with pytest.raises(InputError, match="must all lie in one folder"):
        make_index(f"{tmp_path}/{{a,b}}/part-0000.tar")
    with pytest.raises(InputError, match=r"part-0009\.tar: not there"):
        make_index(f"{folder}/part-0009.tar")
    with pytest.raises(InputError, match=r"no \.tar files there"):
        make_index(str(tmp_path))
    warnings: list[str] = []
    with tarfile.open(f"{folder}/other.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    assert len(make_index(folder, report=warnings.append).shards) == 1
    assert warnings == [
        "2 samples left out, whose only fields are txt, such as other.tar: notes",
    ]
    with pytest.raises(InputError, match="no images in the tars"):
        make_index(f"{folder}/other.tar")
