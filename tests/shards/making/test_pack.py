"""Packing: what goes in comes out, the same bytes every time, whatever stops it in between."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import fsspec
import pytest
import webdataset

from shards import index
from shards.errors import InputError
from shards.index import Index
from shards.making import pack
from shards.making.image_folders import find_images
from shards.samples import Block
from shards.storage import files, retries, upload
from shards.storage.upload import Stream
from tests.conftest import Files, PackFiles
from tests.helpers.places import ROOT


def pack_folder(source: Path | str, out: Path | str, **options: int) -> list[Index]:
    """As launch/pack.py does it."""
    sets, *_ = find_images(str(source))
    indexes = []
    for images in sets:
        plan = pack.plan_shards(images, options.get("shard_bytes", 50_000), options.get("seed", 0))
        url = files.join(str(out), images.name) if images.name else str(out)
        written, _ = pack.write_shards(
            plan,
            url,
            lambda image: files.read(files.join(str(source), image.path)),
            threads=options.get("threads", 2),
            overwrite=bool(options.get("overwrite", 0)),
        )
        indexes.append(written)
    return indexes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write_files(folder: Path, names: list[str], content: bytes = b"image") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def ignore(_: str) -> None:
    pass


def test_plain_webdataset_reads_what_was_packed(
    photo_folder: Path, photos: Files, tmp_path: Path
) -> None:
    (written,) = pack_folder(photo_folder, tmp_path / "out")
    assert written.classes == ["ant", "bee", "cat"]
    assert len(written.shards) > 3
    shards = [written.shard_url(i) for i in range(len(written.shards))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [int(sample["__key__"].split("_")[0]) for sample in samples] == list(range(90))
    found = {}
    for sample in samples:
        name = written.classes[int(sample["cls"])]
        found[f"{name}/{sample['__key__'].split('_')[1]}.jpg"] = sample["jpg"]
    assert found == photos


def test_bytes_depend_on_source_seed_and_size_alone(photo_folder: Path, tmp_path: Path) -> None:
    pack_folder(photo_folder, tmp_path / "a", threads=1)
    pack_folder(photo_folder, tmp_path / "b", threads=4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    pack_folder(photo_folder, tmp_path / "c", seed=1)
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_shards_are_of_about_one_size(photo_folder: Path, tmp_path: Path) -> None:
    (written,) = pack_folder(photo_folder, tmp_path / "out", shard_bytes=40_000)
    sizes = [shard.bytes for shard in written.shards]
    assert max(sizes) < 40_000 * 1.5 + 10_240
    assert min(sizes) > 40_000 / 2


def test_an_image_larger_than_a_shard(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", ["a.jpg", "b.jpg", "c.jpg"], b"x" * 5000)
    (written,) = pack_folder(source, tmp_path / "out", shard_bytes=1000)
    assert [shard.samples for shard in written.shards] == [1, 1, 1]


def test_names(tmp_path: Path) -> None:
    names = [
        "x/a b.c.JPEG",
        "y/deep/\u00fc" + "n" * 90 + ".Png",
        "y/._a.jpg",
        "y/.h/b.jpg",
        "n.txt",
    ]
    source = write_files(tmp_path / "in", [*names, "z/c.webp"])
    sets, others, _ = find_images(str(source))
    assert {reason: left.number for reason, left in others.items()} == {
        "hidden files and files of file managers": 2,
        ".txt files": 1,
    }
    assert others[".txt files"].example == "n.txt"
    assert sets[0].classes == ["x", "y", "z"]
    (written,) = pack_folder(source, tmp_path / "out")
    block = Block(Path(written.shard_url(0)).read_bytes())
    stems = {sample.key.split("_", 1)[1]: block.label(i) for i, sample in enumerate(block.samples)}
    assert stems == {"a_b_c": 0, "_" + "n" * 59: 1, "c": 2}


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", [f"{i}.jpg" for i in range(4)])
    (written,) = pack_folder(source, tmp_path / "out")
    assert written.classes == []
    block = Block(Path(written.shard_url(0)).read_bytes())
    assert [block.label(i) for i in range(4)] == [-1] * 4
    assert {name for sample in block.samples for name in sample.fields} == {"jpg"}


def test_splits_share_their_class_names(tmp_path: Path) -> None:
    photos = ["train/b/1.jpg", "train/c/2.jpg", "val/a/3.jpg", "val/c/4.jpg", "test/5.jpg", "s.jpg"]
    source = write_files(tmp_path / "in", photos)
    sets, others, _ = find_images(str(source))
    assert others == {"images outside of train, val, test": (1, "s.jpg")}
    train, val, test = sets
    assert [part.name for part in sets] == ["train", "val", "test"]
    assert train.classes == val.classes == ["a", "b", "c"]
    assert [image.label for image in train.images] == [1, 2]
    assert [image.label for image in val.images] == [0, 2]
    assert test.classes == []
    assert [image.label for image in test.images] == [-1]
    pack_folder(source, tmp_path / "out")
    assert index.load(str(tmp_path / "out" / "val"), "data.val").samples == 2


def test_any_storage(photo_folder: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(photo_folder), "/source", recursive=True)
    (written,) = pack_folder("memory://source", "memory://packed/set")
    (local,) = pack_folder(photo_folder, tmp_path / "out")
    assert index.load("memory://packed/set", "data.train").digest == local.digest
    for shard in written.shards:
        stored = memory.cat_file(f"/packed/set/{shard.name}")
        assert stored == (tmp_path / "out" / shard.name).read_bytes()
    assert not memory.exists("/packed/set/.pack")


def watch_writes(patch: pytest.MonkeyPatch, call: Callable[[str], None]) -> None:
    """Have `call` called with the URL of each object before it is written."""
    write, open_writer = files.write, upload.open_writer

    def watched_write(url: str, content: bytes) -> None:
        call(url)
        write(url, content)

    def watched_writer(url: str) -> AbstractContextManager[Stream]:
        call(url)
        return open_writer(url)

    patch.setattr(files, "write", watched_write)
    patch.setattr(upload, "open_writer", watched_writer)


@pytest.mark.parametrize("written_before", [0, 1, 3])
@pytest.mark.parametrize("moment", ["tar", "json"])
def test_a_stopped_packing_goes_on(
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written_before: int,
    moment: str,
) -> None:
    """Killed while it wrote a shard, or between a shard and its record."""
    pack_folder(photo_folder, tmp_path / "whole")
    calls: list[str] = []

    def dying(url: str) -> None:
        if url.endswith(f".tar{'.json' if moment == 'json' else ''}"):
            calls.append(url)
            if len(calls) > written_before:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watch_writes(patch, dying)
        with pytest.raises(KeyboardInterrupt):
            pack_folder(photo_folder, tmp_path / "out", threads=1)
    assert not (tmp_path / "out" / index.NAME).exists()
    for name in ("shard-000000.tar", "index.json"):  # SIGKILL leaves these on a disk
        (tmp_path / "out" / f"{name}.0123456789ab.partial").write_bytes(b"half")
    written: list[str] = []
    watch_writes(monkeypatch, written.append)
    pack_folder(photo_folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out" / ".pack").exists()
    total = len(list((tmp_path / "out").glob("*.tar")))
    assert sum(url.endswith(".tar") for url in written) == total - written_before


def test_a_damaged_shard_of_a_stopped_packing_is_written_again(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_folder(photo_folder, tmp_path / "whole")
    monkeypatch.setattr(Index, "save", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack_folder(photo_folder, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "out" / "shard-000001.tar").write_bytes(b"half")
    (tmp_path / "out" / "shard-000002.tar").unlink()
    pack_folder(photo_folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_damaged_records_of_a_stopped_packing_count_as_none(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever values they have, the shards come out the same."""
    pack_folder(photo_folder, tmp_path / "whole")
    out = tmp_path / "out"
    monkeypatch.setattr(Index, "save", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack_folder(photo_folder, out)
    record = out / ".pack" / "shard-000000.tar.json"
    sound = json.loads(record.read_text())
    wrong: dict[str, list[object]] = {
        "samples": [True, 1e400, -1, 2**70, None],
        "blocks": [[], [[0, 1.5]], [[-512, 1]], {"a": 1}, [[0, 2**60]]],
        "crcs": [[], None, [-1], ["a"], {}],
    }
    for name, value in ((name, value) for name, values in wrong.items() for value in values):
        record.write_text(json.dumps(sound | {name: value}))
        with pytest.raises(ZeroDivisionError):
            pack_folder(photo_folder, out)
        assert json.loads(record.read_text()) == sound, (name, value)
    for content in (b"[" * 10**5, b"\xff", b"[]"):
        record.write_bytes(content)
        with pytest.raises(ZeroDivisionError):
            pack_folder(photo_folder, out)
    monkeypatch.undo()
    (out / ".pack" / "plan.json").write_bytes(b"[" * 10**5)
    with pytest.raises(InputError, match="holds other shards, unfinished"):
        pack_folder(photo_folder, out)
    pack_folder(photo_folder, out, overwrite=1)
    assert contents(out) == contents(tmp_path / "whole")


def test_local_writes_are_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", 1)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        files.write(str(tmp_path / "new" / "shard.tar"), b"content")
    assert not (tmp_path / "new" / "shard.tar").exists()


def test_a_finished_packing_stands(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_folder(photo_folder, out)
    before = contents(out)
    pack_folder(photo_folder, out)
    assert contents(out) == before
    with pytest.raises(InputError, match=r"OUT .*holds other shards.*--overwrite"):
        pack_folder(photo_folder, out, seed=1)
    assert contents(out) == before
    write_files(out, ["notes.txt"])
    pack_folder(photo_folder, out, seed=1, shard_bytes=200_000, overwrite=1)
    assert len(list(out.glob("*.tar"))) < len(before) - 1
    assert (out / "notes.txt").exists()


def test_foreign_tars_are_not_overwritten(photo_folder: Path, tmp_path: Path) -> None:
    out = write_files(tmp_path / "out", ["shard-000000.tar"], b"precious")
    with pytest.raises(InputError, match="holds other shards, unfinished"):
        pack_folder(photo_folder, out)
    assert (out / "shard-000000.tar").read_bytes() == b"precious"


def test_a_source_that_changes_meanwhile(photo_folder: Path, tmp_path: Path) -> None:
    sets, *_ = find_images(str(photo_folder))
    plan = pack.plan_shards(sets[0], 80_000, 0)
    with pytest.raises(InputError, match=r"SOURCE .*\.jpg: has changed meanwhile"):
        pack.write_shards(plan, str(tmp_path / "out"), lambda _: b"other", threads=2)


# The command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pack.py", *arguments])
    runpy.run_path(str(ROOT / "launch" / "pack.py"), run_name="__main__")


def test_command(
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "out")
    run(monkeypatch, str(photo_folder), out, "--shard-mb", "0.08")
    printed = capsys.readouterr().out
    assert printed.startswith("90 samples, 3 classes, ")
    assert printed.endswith(f": {out}/index.json; use --data.train {out}\n")
    run(monkeypatch, str(photo_folder), out, "--shard-mb", "0.08")
    assert capsys.readouterr().out == f"already packed: {printed}"
    run(monkeypatch, "--index-only", out)
    assert capsys.readouterr().out == printed
    packed = index.load(out, "data.train")
    records = packed.plan, [shard.crcs for shard in packed.shards]
    names = tmp_path / "names.txt"
    names.write_text("A\nB\nC\n")
    run(monkeypatch, "--index-only", out, "--classes", str(names))
    renamed = index.load(out, "data.train")
    assert renamed.classes == ["A", "B", "C"]
    assert (renamed.plan, [shard.crcs for shard in renamed.shards]) == records
    assert all(renamed.shards[0].crcs or [])
    for arguments, text in (
        ([out], "error: OUT is missing"),
        (["--index-only", out, out], "error: .* is named twice"),
        ([str(photo_folder), out, "--classes", "f"], "error: --classes f: no such file"),
        (["--index-only", out, "--classes", "nowhere"], "error: --classes nowhere: no such file"),
        ([str(photo_folder), out, "--threads", "0"], "error: --threads must be at least 1"),
        ([str(photo_folder), out, "--shard-mb", "-1"], "error: --shard-mb must be positive"),
    ):
        with pytest.raises(SystemExit, match=text):
            run(monkeypatch, *arguments)


def test_command_fails_with_one_line(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_folder(photo_folder, out)
    command = [sys.executable, "launch/pack.py", str(photo_folder), str(out), "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().startswith(f"error: OUT {out}: holds other shards")
    assert len(done.stderr.strip().splitlines()) == 1


def test_pack_files_fixture_is_what_the_folder_gives(
    pack_files: PackFiles, photos: Files, photo_folder: Path, tmp_path: Path
) -> None:
    one = pack_files(str(tmp_path / "a"), photos)
    (two,) = pack_folder(photo_folder, tmp_path / "b", shard_bytes=50_000)
    assert one.digest == two.digest
