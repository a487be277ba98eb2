"""The local cache: the shards that fit, whole, fetched once by any number of threads at a time."""

import errno
import os
import secrets
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shards.cache import GB, STALE, ShardCache
from shards.errors import InputError
from shards.index import Index
from shards.storage import files
from tests.conftest import Files, PackFiles
from tests.helpers.places import ROOT


@pytest.fixture
def remote(pack_files: PackFiles, photos: Files) -> Index:
    """The photos in about five shards, none of them on a disk."""
    return pack_files(f"memory://{secrets.token_hex(6)}", photos)  # some tests damage it


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs of the shards fetched whole, as they are."""
    found: list[str] = []
    download = files.download

    def noted(url: str, size: int, path: str) -> None:
        found.append(url)
        time.sleep(0.02)  # so that others come meanwhile
        download(url, size, path)

    monkeypatch.setattr(files, "download", noted)
    return found


def ignore(_: str) -> None:
    pass


def make(index: Index, folder: Path | str, size: float = GB, report: Any = ignore) -> ShardCache:
    """A cache of `size` bytes."""
    return ShardCache(index, str(folder), size / GB, report)


def copies(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def whole(index: Index, shard: int) -> bytes:
    return files.read(index.shard_url(shard))


def test_the_first_shards_that_fit_are_kept(remote: Index, tmp_path: Path) -> None:
    sizes = [shard.bytes for shard in remote.shards]
    for size, kept in (
        *[(0, 0), (sizes[0] - 1, 0), (sizes[0], 1)],
        *[(sizes[0] + sizes[1], 2), (sum(sizes) - 1, len(sizes) - 1), (sum(sizes), len(sizes))],
    ):
        cache = make(remote, tmp_path, size)
        assert [cache.keeps(i) for i in range(len(sizes))] == [i < kept for i in range(len(sizes))]


def test_reads_are_the_shards_bytes(remote: Index, tmp_path: Path, downloads: list[str]) -> None:
    cache = make(remote, tmp_path / "not" / "there")
    for shard in (1, 0):
        for start, stop in ((0, 512), (5_000, 40_000), (0, remote.shards[shard].bytes)):
            assert cache.read(shard, start, stop) == whole(remote, shard)[start:stop]
    assert downloads == [remote.shard_url(1), remote.shard_url(0)]
    assert len(copies(tmp_path)) == 2
    again = make(remote, tmp_path / "not" / "there")
    assert again.read(1, 3, 9) == whole(remote, 1)[3:9]
    assert len(downloads) == 2


def test_threads_fetch_a_shard_once(remote: Index, tmp_path: Path, downloads: list[str]) -> None:
    cache = make(remote, tmp_path)
    with ThreadPoolExecutor(16) as threads:
        parts = list(threads.map(lambda i: cache.read(i % 2, i, i + 20_000), range(64)))
    assert parts == [whole(remote, i % 2)[i : i + 20_000] for i in range(64)]
    assert sorted(downloads) == [remote.shard_url(0), remote.shard_url(1)]


READ_ALL = """
import sys
from shards import index
from shards.storage import files
from shards.cache import ShardCache
found = index.load(sys.argv[1], "data.train")
cache = ShardCache(found, sys.argv[2], 1, print)
for turn in range(len(found.shards)):
    shard = (turn + int(sys.argv[3])) % len(found.shards)
    content = cache.read(shard, 0, found.shards[shard].bytes)
    assert content == files.read(found.shard_url(shard))
"""


def test_processes_share_a_folder(packed: Index, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", READ_ALL, packed.url, str(tmp_path / "cache")]
    running = [subprocess.Popen([*arguments, str(i)], cwd=ROOT) for i in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert len(copies(tmp_path / "cache")) == len(packed.shards)


def test_no_reader_sees_half_a_copy(
    remote: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As simplecache would let it: a second process comes while the first one fetches."""
    monkeypatch.setattr(files, "PART", 1_000)
    inside, go_on = threading.Event(), threading.Event()
    read = files.read

    def slow(url: str, start: int | None = None, stop: int | None = None) -> bytes:
        if start == 5_000:
            inside.set()
            assert go_on.wait(20)
        return read(url, start, stop)

    first, second = make(remote, tmp_path), make(remote, tmp_path)
    with ThreadPoolExecutor(1) as threads:
        monkeypatch.setattr(files, "read", slow)
        running = threads.submit(first.read, 0, 0, 9_000)
        assert inside.wait(20)
        assert [path.suffix for path in copies(tmp_path)] == [".partial"]
        monkeypatch.setattr(files, "read", read)
        assert second.read(0, 0, 9_000) == whole(remote, 0)[:9_000]
        go_on.set()
        assert running.result() == whole(remote, 0)[:9_000]
    assert len(copies(tmp_path)) == 1


@pytest.mark.parametrize("content", [b"", b"short", bytes(10**6)])
def test_a_copy_of_wrong_length_is_fetched_again(
    remote: Index, tmp_path: Path, downloads: list[str], content: bytes
) -> None:
    make(remote, tmp_path).read(0, 0, 9)
    (copy,) = copies(tmp_path)
    copy.write_bytes(content)
    assert make(remote, tmp_path).read(0, 0, 9_000) == whole(remote, 0)[:9_000]
    assert len(downloads) == 2
    assert copy.read_bytes() == whole(remote, 0)


def test_a_dropped_copy_is_fetched_again(
    remote: Index, tmp_path: Path, downloads: list[str]
) -> None:
    cache = make(remote, tmp_path)
    cache.drop(0)
    cache.read(0, 0, 9)
    cache.drop(0)
    assert copies(tmp_path) == []
    cache.read(0, 0, 9)
    assert len(downloads) == 2


def test_another_data_set_has_other_copies(
    remote: Index, pack_files: PackFiles, photos: Files, tmp_path: Path
) -> None:
    make(remote, tmp_path).read(0, 0, 9)
    other = pack_files(f"memory://{secrets.token_hex(6)}", dict(list(photos.items())[:60]))
    assert make(other, tmp_path).read(0, 0, 900) == whole(other, 0)[:900]
    assert len(copies(tmp_path)) == 2


def test_names_in_an_index_lead_nowhere_else(remote: Index, tmp_path: Path) -> None:
    remote.shards[0].name = "../cached/" + remote.shards[0].name
    files.write(remote.shard_url(0), b"x" * remote.shards[0].bytes)
    make(remote, tmp_path / "a" / "b").read(0, 0, 9)
    assert [path.parent.parent for path in copies(tmp_path)] == [tmp_path / "a" / "b"]


def test_a_full_disk_ends_caching_only(
    remote: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[str] = []
    cache = make(remote, tmp_path, report=reports.append)
    cache.read(0, 0, 9)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    for shard in (1, 2, 1, 0):
        assert cache.read(shard, 5, 5_000) == whole(remote, shard)[5:5_000]
    (report,) = reports
    assert report.startswith(f"data.cache {tmp_path}")
    assert "No space left on device" in report
    assert len(copies(tmp_path)) == 1


def test_a_folder_that_a_full_disk_does_not_take_ends_caching_only(
    remote: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(Path, "mkdir", full)
    reports: list[str] = []
    cache = ShardCache(remote, str(tmp_path), 1, reports.append)
    for _ in range(2):
        assert cache.read(0, 0, 512) == files.read(remote.shard_url(0), 0, 512)
    (line,) = reports
    assert "Disk quota exceeded; no more shards are kept there" in line


def test_a_missing_shard_is_missing(remote: Index, tmp_path: Path) -> None:
    files.remove(remote.shard_url(1))
    reports: list[str] = []
    cache = make(remote, tmp_path, report=reports.append)
    with pytest.raises(FileNotFoundError):
        cache.read(1, 0, 9)
    assert reports == []
    assert copies(tmp_path) == []


def test_what_a_killed_process_left_is_removed(remote: Index, tmp_path: Path) -> None:
    cache = make(remote, tmp_path)
    cache.read(0, 0, 9)
    (copy,) = copies(tmp_path)
    for name, age in (("old.partial", STALE + 60), ("young.partial", STALE - 60)):
        (copy.parent / name).write_bytes(b"half")
        os.utime(copy.parent / name, (time.time() - age,) * 2)
    make(remote, tmp_path)
    assert [path.name for path in copies(tmp_path)] == [copy.name, "young.partial"]


def test_folders_that_cannot_be(remote: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"data\.cache .*/file/below: Not a directory"):
        make(remote, f"{tmp_path}/file/below")
    with pytest.raises(InputError, match=r"data\.cache s3://bucket/cache: must be a local folder"):
        make(remote, "s3://bucket/cache")
