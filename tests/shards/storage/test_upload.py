"""Objects written as a stream: whole or not at all, in parts where they are large."""

import contextlib
import os
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from shards.storage import files, retries, upload
from shards.storage.upload import open_writer
from tests.helpers.fault_proxy import FaultProxy

PART = 5 << 20  # the least that S3 takes
CONTENT = np.random.default_rng(0).bytes(12_345_678)  # two parts and a piece


@pytest.fixture(params=["disk", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL below which nothing is, on each kind of store."""
    if request.param == "disk":
        return str(tmp_path / "not" / "there")
    return (
        f"memory://{tmp_path.name}" if request.param == "memory" else request.getfixturevalue("s3")
    )


def plain_read(url: str) -> bytes:
    with fsspec.open(url, "rb") as file:
        content: bytes = file.read()
    return content


def unfinished(bucket: str) -> list[Any]:
    """Multipart uploads that were begun, and neither completed nor aborted."""
    filesystem, name = fsspec.core.url_to_fs(bucket)
    answer = filesystem.call_s3("list_multipart_uploads", Bucket=name)
    return list(answer.get("Uploads", []))


def first_tries_fail(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: str, only: str
) -> None:
    """Requests fail until the wait before the first second try."""
    proxy.set({fault: 1.0}, only)
    monkeypatch.setattr(time, "sleep", lambda _: proxy.set({}))


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, 2 * PART, len(CONTENT)])
def test_what_was_written_is_there(folder: str, size: int) -> None:
    content = memoryview(CONTENT)[:size]
    with open_writer(f"{folder}/object", part=PART) as stream:
        for start in range(0, size, 999_999):
            piece = content[start : start + 999_999]
            assert stream.write(piece) == len(piece)
        assert stream.tell() == size
    assert plain_read(f"{folder}/object") == content
    assert (stream.length, stream.crc) == (size, zlib.crc32(content))


def test_an_array_is_written_as_its_bytes(folder: str) -> None:
    array = np.arange(7.0)
    with open_writer(f"{folder}/object") as stream:
        assert stream.write(array.data) == array.nbytes
    assert plain_read(f"{folder}/object") == array.tobytes()


def test_what_was_written_may_change_after(folder: str) -> None:
    """The caller's buffer is its own again when `write` returns."""
    buffer = bytearray(CONTENT[:1000])
    with open_writer(f"{folder}/object") as stream:
        stream.write(buffer)
        buffer[:] = bytes(1000)
    assert plain_read(f"{folder}/object") == CONTENT[:1000]


def test_an_error_of_the_caller_leaves_nothing(folder: str) -> None:
    def write_some() -> None:
        with open_writer(f"{folder}/object", part=PART) as stream:
            stream.write(CONTENT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_some()
    assert files.list_names(folder) == []
    if folder.startswith("s3://"):
        assert unfinished(folder) == []


def test_an_error_leaves_the_object_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(b"before")
    with (
        contextlib.suppress(ZeroDivisionError),
        open_writer(str(tmp_path / "object")) as stream,
    ):
        stream.write(b"after")
        raise ZeroDivisionError
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("object", b"before")]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OSError, match=f"{tmp_path}/object: .*No space left"),
        open_writer(f"{tmp_path}/object") as stream,
    ):
        stream.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_must_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    url = f"{tmp_path}/file/object"
    with pytest.raises(OSError, match=f"{tmp_path}/file"), open_writer(url):
        pass


def test_a_refusal_is_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with (
        pytest.raises(PermissionError, match=f"^{s3}/object: "),
        open_writer(f"{s3}/object", part=PART) as stream,
    ):
        stream.write(CONTENT)


def test_requests(s3: str, proxy: FaultProxy) -> None:
    """A large object is three parts in one upload, a small one is one PUT."""
    with open_writer(f"{s3}/large", part=PART) as stream:
        stream.write(CONTENT)
    assert proxy.requests(r"PUT .*/large\?.*partNumber=") == 3
    assert proxy.requests("/large", "PUT") == 3
    assert proxy.requests("/large", "POST") == 2
    with open_writer(f"{s3}/small", part=PART) as stream:
        stream.write(CONTENT[:1000])
    assert proxy.requests("/small") == proxy.requests("/small", "PUT") == 1


@pytest.mark.parametrize("fault", ["slow_down", "drop"])
def test_parts_are_tried_again(
    s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    first_tries_fail(proxy, monkeypatch, fault, "partNumber=")
    with open_writer(f"{s3}/object", part=PART) as stream:
        stream.write(CONTENT)
    assert proxy.requests("partNumber=") == 3 + proxy.counts()[fault] > 3
    assert plain_read(f"{s3}/object") == CONTENT


def test_a_part_that_never_arrives_leaves_nothing(
    s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", 3)
    proxy.set({"slow_down": 1.0}, only="partNumber=2")
    with (
        pytest.raises(OSError, match=f"^{s3}/object: gave up after 3 tries"),
        open_writer(f"{s3}/object", part=PART) as stream,
    ):
        stream.write(CONTENT)
    assert proxy.requests("partNumber=2") == 3
    assert not files.exists(f"{s3}/object")
    assert unfinished(s3) == []


@pytest.mark.parametrize("lost", ["create", "complete"])
def test_an_answer_that_got_lost(
    s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """An upload that was completed is not there any more for the next try."""
    pattern = {"create": r"POST .*\?uploads", "complete": r"POST .*\?uploadId="}[lost]
    first_tries_fail(proxy, monkeypatch, "drop", pattern)
    with open_writer(f"{s3}/object", part=PART) as stream:
        stream.write(CONTENT)
    assert proxy.requests(pattern) == 2
    assert plain_read(f"{s3}/object") == CONTENT


class FakeStore:
    """Takes the place of an upload's requests; its parts wait until `open` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.parts: dict[int, int] = {}
        self.on_their_way = 0
        self.aborted_with: int | None = None
        self.completed: list[int] = []
        self.length = -1
        monkeypatch.setattr(upload._Upload, "_call", self.call)

    def call(self, method: str, content: bytearray | None = None, **options: Any) -> Any:
        if method == "upload_part":
            self.parts[options["PartNumber"]] = len(content or b"")
            self.on_their_way += 1
            assert self.open.wait(60)
            time.sleep(0.01)
            self.on_their_way -= 1
        if method == "abort_multipart_upload":
            self.aborted_with = self.on_their_way
        if method == "complete_multipart_upload":
            self.completed = [part["PartNumber"] for part in options["MultipartUpload"]["Parts"]]
            raise FileNotFoundError("NoSuchUpload")
        return {"UploadId": "1", "ETag": "2", "ContentLength": self.length}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that is faster than the store waits, with PARALLEL parts on their way."""
    store = FakeStore(monkeypatch)
    store.length = 100 * 1000
    taken = []

    def write() -> None:
        with open_writer("s3://bucket/object", part=1000) as stream:
            for _ in range(100):
                stream.write(bytes(1000))
                taken.append(1000)

    writer = threading.Thread(target=write)
    writer.start()
    deadline = time.monotonic() + 60
    while len(store.parts) < upload.PARALLEL and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.join(0.2)
    assert writer.is_alive()
    assert len(taken) <= len(store.parts) == upload.PARALLEL
    store.open.set()
    writer.join(60)
    assert store.parts == dict.fromkeys(range(1, 101), 1000)
    assert store.completed == list(range(1, 101))


def test_parts_are_waited_for_before_an_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came after it would stay in the store for ever."""
    store = FakeStore(monkeypatch)
    with contextlib.suppress(ZeroDivisionError), open_writer("s3://b/o", part=10) as stream:
        stream.write(bytes(20))
        store.open.set()
        raise ZeroDivisionError
    assert store.aborted_with == 0


def test_parts_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "GROWTH", 2)
    store = FakeStore(monkeypatch)
    store.open.set()
    store.length = 80
    with open_writer("s3://bucket/object", part=10) as stream:
        stream.write(bytes(80))
    assert store.parts == {1: 10, 2: 10, 3: 20, 4: 20, 5: 20}


def test_five_terabytes_fit() -> None:
    sizes = [files.PART << number // upload.GROWTH for number in range(10_000)]
    within = [size for size in sizes if size <= 5 << 30]  # what S3 allows a part
    assert sum(within) > 5 << 40


def test_an_upload_that_is_gone_is_done_only_if_the_object_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = FakeStore(monkeypatch)
    store.open.set()
    store.length = 79
    with (
        pytest.raises(FileNotFoundError, match="NoSuchUpload"),
        open_writer("s3://bucket/object", part=10) as stream,
    ):
        stream.write(bytes(80))
