"""Storage: retries in one place, bounded; errors in one line; files whole or not there."""

import contextlib
import errno
import io
import os
import random
import re
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from shards.errors import InputError
from shards.storage import exclusive, files, retries
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.object_store import lead_to

CONTENT = np.random.default_rng(0).bytes(100_000)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF", 0.001)


@pytest.fixture
def proxy(proxy: FaultProxy, s3: str) -> FaultProxy:
    """The one that is harmless until it is told otherwise, where `object` is."""
    files.write(f"{s3}/object", CONTENT)
    del proxy.log[:]
    return proxy


def test_a_read_is_one_request(proxy: FaultProxy, s3: str) -> None:
    assert files.read(f"{s3}/object") == CONTENT
    assert files.read(f"{s3}/object", 5, 70_000) == CONTENT[5:70_000]
    assert [(request.method, request.status) for request in proxy.log] == [
        ("GET", 200),
        ("GET", 206),
    ]
    files.write(f"{s3}/empty", b"")
    assert files.read(f"{s3}/empty") == b""


def test_retries_are_not_multiplied(proxy: FaultProxy, s3: str) -> None:
    """Each try of ours is one request: botocore's and s3fs's own retries are off."""
    proxy.set({"slow_down": 1})
    for call in (
        lambda: files.read(f"{s3}/object", 0, 9),
        lambda: files.read(f"{s3}/object"),
        lambda: files.write(f"{s3}/new", b"1"),
        lambda: files.size(f"{s3}/object"),
        lambda: files.list_names(s3),
    ):
        before = len(proxy.log)
        with pytest.raises(
            OSError, match=f"gave up after {retries.ATTEMPTS} tries.*(SlowDown|503)"
        ):
            call()
        assert len(proxy.log) - before == retries.ATTEMPTS


@pytest.mark.parametrize("fault", ["slow_down", "drop", "truncate"])
def test_reads_through_faults(proxy: FaultProxy, s3: str, fault: str) -> None:
    proxy.set({fault: 0.2})
    generator = random.Random(1)
    for _ in range(40):
        start = generator.randrange(len(CONTENT) - 1)
        stop = generator.randrange(start + 1, len(CONTENT))
        assert files.read(f"{s3}/object", start, stop) == CONTENT[start:stop]
    assert proxy.counts()[fault] > 3


def test_a_range_beyond_the_end(proxy: FaultProxy, s3: str) -> None:
    for start, came in ((99_990, 10), (100_000, 0), (200_000, 0)):
        told = f"bytes {start} to {start + 50}: {came} of 50 bytes came"
        with pytest.raises(retries.WrongLength, match=f"^{s3}/object: gave up after 4 .*{told}$"):
            files.read(f"{s3}/object", start, start + 50)
    assert proxy.requests(method="GET") == 12


def failure(url: str) -> str:
    """The one line that a read of a range of `url` ends with."""
    with pytest.raises((OSError, InputError)) as caught:
        files.read(url, 0, 10)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.__suppress_context__  # nothing else is shown, not even in a traceback
    return text


def test_what_cannot_be_mended_is_one_request(proxy: FaultProxy, s3: str) -> None:
    for url, text in (
        ("s3://no-such-bucket/object", "create the bucket, or correct the URL"),
        (f"{s3}/none", "does not exist"),
    ):
        before = len(proxy.log)
        assert failure(url).startswith(f"{url}: ")
        assert text in failure(url)
        assert len(proxy.log) - before == 2


def test_a_missing_bucket_is_no_empty_folder(proxy: FaultProxy, s3: str) -> None:  # noqa: ARG001
    assert files.list_names(f"{s3}/nothing/here") == []
    with pytest.raises(OSError, match=r"^s3://no-such-bucket/folder: .*create the bucket"):
        files.list_names("s3://no-such-bucket/folder")


def test_credentials(proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{s3}/object"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "gu3ssed")
    lead_to(proxy.endpoint, monkeypatch)
    text = failure(url)
    assert text.startswith(f"{url}: access denied: ")
    assert "SignatureDoesNotMatch" in text
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in text
    assert "gu3ssed" not in text
    with pytest.raises(PermissionError):
        files.write(url, b"")
    assert len(proxy.log) == 2
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    lead_to(proxy.endpoint, monkeypatch)
    assert "Unable to locate credentials: set AWS_ACCESS_KEY_ID" in failure(url)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    lead_to(proxy.endpoint, monkeypatch)
    assert "(nobody) could not be found: correct AWS_PROFILE" in failure(url)
    assert len(proxy.log) == 2


@pytest.mark.parametrize("user", ["key:s3cret", "key:s3/cret", "key"])
def test_credentials_in_a_url_are_refused_and_not_shown(user: str) -> None:
    with pytest.raises(InputError) as caught:
        files.read(f"s3://{user}@bucket/object?token=t0ken")
    text = str(caught.value)
    assert text.startswith(
        "s3://bucket/object: " if user != "key:s3/cret" else "s3://bucket/object"
    )
    assert "set AWS_ACCESS_KEY_ID" in text
    assert not re.search("cret|s3/|t0ken", text.removeprefix("s3://"))


def test_a_dead_endpoint(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    lead_to(endpoint, monkeypatch)
    text = failure(f"{s3}/object")
    assert f"{s3}/object: gave up after {retries.ATTEMPTS} tries" in text
    assert f'Could not connect to the endpoint URL: "{endpoint}' in text
    assert "is AWS_ENDPOINT_URL right" in text


@pytest.mark.timeout(60)  # s3fs's own 15 s for each of the tries would be 120
def test_a_server_that_never_answers(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timeout each, and a user's own settings, from fsspec's configuration, hold."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = {"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        monkeypatch.setitem(
            fsspec.config.conf, "s3", settings | {"config_kwargs": {"read_timeout": 0.05}}
        )
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        text = failure(f"{s3}/object")
    assert f"gave up after {retries.ATTEMPTS} tries" in text
    assert 'Read timeout on endpoint URL: "http://127.0.0.1' in text


def test_a_server_that_sends_too_slowly(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then would keep a read timeout from ending it."""
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    monkeypatch.setattr(files, "SECONDS", 0.3)
    done = threading.Event()

    def trickle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(9999)
            connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\n\r\n")
            while not done.wait(0.1):
                connection.sendall(b"x")

    def serve(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = server.accept()[0]
                threading.Thread(target=trickle, args=[connection], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=[server], daemon=True).start()
        lead_to(f"http://127.0.0.1:{server.getsockname()[1]}", monkeypatch)
        text = failure(f"{s3}/object")
    done.set()
    assert "gave up after 2 tries" in text
    assert "timed out" in text


# Files


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_user_set(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.write(f"{tmp_path}/new/written", b"1")
        assert exclusive.create(f"{tmp_path}/new/created", b"1")
        files.write("memory://mode", b"12")
        files.download("memory://mode", 2, f"{tmp_path}/new/downloaded")
    finally:
        os.umask(before)
    made = list((tmp_path / "new").iterdir())
    assert {path.name for path in made} == {"written", "created", "downloaded"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o666 & ~umask}


def test_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([i]) * (1 << 20) for i in range(8)]
    files.write(str(path), contents[0])
    seen = set()
    with ThreadPoolExecutor(9) as threads:
        writes = [threads.submit(files.write, str(path), c) for c in contents for _ in range(5)]
        while not all(write.done() for write in writes):
            seen.add(path.read_bytes())
        for write in writes:
            write.result()
    assert seen
    assert seen <= set(contents)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_when_a_write_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(f"{tmp_path}/file", b"before")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match=r"file: .*No space left"):
        files.write(f"{tmp_path}/file", b"after")
    with pytest.raises(OSError, match=r"other: .*No space left"):
        exclusive.create(f"{tmp_path}/other", b"after")
    monkeypatch.undo()
    monkeypatch.setattr(retries, "ATTEMPTS", 1)
    with pytest.raises(FileNotFoundError):
        files.download("memory://never-written", 10, f"{tmp_path}/copy")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert files.read(f"{tmp_path}/file") == b"before"


def test_download_takes_pieces(
    proxy: FaultProxy, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PART", 30_000)
    proxy.set({"drop": 0.2, "truncate": 0.2})
    files.download(f"{s3}/object", len(CONTENT), f"{tmp_path}/copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert max(r.sent for r in proxy.log) == 30_000
    with pytest.raises(retries.WrongLength):
        files.download(f"{s3}/object", len(CONTENT) + 1, f"{tmp_path}/longer")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_remote_file_reads_as_a_local_one(
    proxy: FaultProxy, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "READ_BLOCK", 5_000)
    (tmp_path / "object").write_bytes(CONTENT)
    proxy.set({"slow_down": 0.1, "drop": 0.1, "truncate": 0.1}, only="^GET")
    generator = random.Random(0)
    with files.open_reader(f"{s3}/object") as remote, open(tmp_path / "object", "rb") as local:
        for _ in range(100):
            whence, count = generator.choice([0, 1, 2]), generator.choice([0, 1, 512, 9_000])
            offset = generator.randrange(len(CONTENT) + 10) * (-1 if whence == 2 else 1)
            offset = generator.randrange(20_000) if whence == 1 else max(offset, -len(CONTENT))
            assert remote.seek(offset, whence) == local.seek(offset, whence)
            assert remote.read(count) == local.read(count)
        remote.seek(-30_000, io.SEEK_END)
        assert remote.read() == CONTENT[-30_000:]
    assert proxy.counts()["drop"] > 0
    with pytest.raises(FileNotFoundError):
        files.open_reader(f"{s3}/none")
