"""The store and the proxy that other tests stand on: a real S3 server, and faults that are seen."""

import concurrent.futures
import dataclasses
import http.client
import secrets
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from shards.storage import exclusive, files
from tests.helpers import fault_proxy
from tests.helpers import object_store as object_store_module
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.object_store import ObjectStore

CONTENT = secrets.token_bytes(200_000)


def test_bytes_in_and_out(s3: str) -> None:
    url = f"{s3}/folder/object"
    files.write(url, CONTENT)
    assert files.read(url) == CONTENT
    assert files.read(url, 70_000, 150_000) == CONTENT[70_000:150_000]
    assert files.size(url) == len(CONTENT)
    files.write(f"{s3}/other", b"")
    assert files.list_names(s3) == ["folder", "other"]
    assert dict(files.walk(s3)) == {"folder/object": len(CONTENT), "other": 0}
    files.remove(f"{s3}/folder")
    assert not files.exists(url)
    with pytest.raises(FileNotFoundError):
        files.read(url)


def test_create_has_one_winner(s3: str) -> None:
    url = f"{s3}/flag"
    contents = [f"run {i}".encode() for i in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        created = list(pool.map(lambda content: exclusive.create(url, content), contents))
    assert sorted(created) == [False, False, False, True]
    winner = contents[created.index(True)]
    assert files.read(url) == winner
    assert exclusive.create(url, winner)  # as after a lost answer
    assert files.read(url) == winner


def test_large_objects_go_up_in_parts(s3: str) -> None:
    content = secrets.token_bytes(11 << 20)
    filesystem, path = fsspec.core.url_to_fs(f"{s3}/large")
    with filesystem.open(path, "wb", block_size=5 << 20) as file:
        file.writelines(content[i : i + (5 << 20)] for i in range(0, len(content), 5 << 20))
    assert filesystem.info(path)["ETag"].strip('"').endswith("-3")
    assert files.read(f"{s3}/large") == content
    with files.open_reader(f"{s3}/large") as reader:
        reader.seek(5 << 20)
        assert reader.read(99) == content[5 << 20 :][:99]


def test_strangers_are_refused(object_store: ObjectStore, s3: str) -> None:
    stranger = dataclasses.replace(object_store, secret_key="guessed").filesystem()
    with pytest.raises(PermissionError):
        stranger.pipe_file(f"{s3}/object", b"")


def test_a_server_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho started in $HOME; echo out of luck; exit 3")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: str(program))
    with pytest.raises(RuntimeError, match=r"(?s)refused.*out of luck") as caught:  # noqa: SIM117
        with object_store_module.serve():
            pass
    folder = str(caught.value).split("started in ")[1].split("\n")[0]
    assert not Path(folder).exists()


@pytest.fixture
def proxy(object_store: ObjectStore) -> Iterator[FaultProxy]:
    with FaultProxy(object_store.endpoint, seed=0, faults={}) as running:
        yield running


@pytest.fixture
def through(proxy: FaultProxy, object_store: ObjectStore) -> Any:
    """The store through the proxy, by an s3fs that gives up at the first failure."""
    store = object_store.through(proxy.endpoint)
    filesystem = store.filesystem(config_kwargs={"retries": {"total_max_attempts": 1}})
    filesystem.retries = 1
    return filesystem


class Raw:
    """Signed requests by a client that mends nothing, one after the other on one connection."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        host = urllib.parse.urlsplit(filesystem.endpoint_url).netloc
        self.connection = http.client.HTTPConnection(host, timeout=20)

    def ask(self, method: str, body: Any = None, **headers: str) -> tuple[int, int | None, bytes]:
        """Status, Content-Length and body."""
        name = {"GET": "get", "PUT": "put", "HEAD": "head", "DELETE": "delete"}[method]
        url = self._filesystem.url(self._path, client_method=f"{name}_object")
        target = url.removeprefix(self._filesystem.endpoint_url)
        fields = {key.replace("_", "-"): value for key, value in headers.items()}
        self.connection.request(method, target, body, fields)
        answer = self.connection.getresponse()
        return answer.status, answer.length, answer.read()


@pytest.fixture
def raw(through: Any, s3: str) -> Raw:
    files.write(f"{s3}/object", CONTENT)
    return Raw(through, f"{s3}/object")


def test_proxy_changes_nothing_without_faults(through: Any, proxy: FaultProxy, s3: str) -> None:
    content = secrets.token_bytes(11 << 20)
    with through.open(f"{s3}/a/large", "wb", block_size=5 << 20) as file:
        file.writelines(content[i : i + (5 << 20)] for i in range(0, len(content), 5 << 20))
    assert through.cat_file(f"{s3}/a/large") == content
    names = {f"{s3}/b/{i}".removeprefix("s3://"): secrets.token_bytes(i) for i in range(1, 31)}
    through.pipe(names)
    assert through.cat(list(names)) == names
    assert through.find(f"{s3}/b") == sorted(names)
    assert through.cat_file(f"{s3}/a/large", start=1000, end=3000) == content[1000:3000]
    through.rm(f"{s3}/b", recursive=True)
    assert not any(through.exists(name) for name in names)
    assert proxy.bytes_sent("^GET .*/a/large") == len(content) + 2000
    assert proxy.requests("/a/large.*partNumber=", "PUT") == 3
    assert proxy.requests(r"/b/\d+", "PUT") == 30
    assert sum(proxy.counts().values()) == 0


def test_one_connection_serves_all_kinds_of_requests(raw: Raw) -> None:
    assert raw.ask("HEAD") == (200, 0, b"")
    socket = raw.connection.sock
    status, length, body = raw.ask("GET", Range="bytes=5-9")
    assert (status, length, body) == (206, 5, CONTENT[5:10])
    chunks = [CONTENT[:70_000], CONTENT[70_000:90_000]]
    assert raw.ask("PUT", iter(chunks))[0] == 200
    assert raw.ask("GET")[2] == CONTENT[:90_000]
    assert raw.ask("PUT", b"waited", Expect="100-continue")[0] == 200
    assert raw.ask("GET")[2] == b"waited"
    assert raw.ask("GET", If_Modified_Since="Fri, 01 Jan 2100 00:00:00 GMT")[0] == 304
    assert raw.ask("DELETE")[0] == 204
    assert raw.ask("GET")[0] == 404
    assert raw.connection.sock is socket


def test_delay(raw: Raw, proxy: FaultProxy) -> None:
    proxy.set({"delay": 1})
    start = time.monotonic()
    assert raw.ask("GET")[2] == CONTENT
    assert time.monotonic() - start > fault_proxy.DELAY[0]
    assert proxy.counts()["delay"] == 1


def test_slow_down(raw: Raw, through: Any, proxy: FaultProxy, s3: str) -> None:
    proxy.set({"slow_down": 1})
    for method, body in (("GET", None), ("PUT", b"new")):
        status, _, answer = raw.ask(method, body)
        assert (status, b"<Code>SlowDown</Code>" in answer) == (503, True)
    with pytest.raises(OSError, match="reduce your request rate"):
        through.pipe_file(f"{s3}/object", b"new")
    assert files.read(f"{s3}/object") == CONTENT
    assert proxy.counts()["slow_down"] == 3
    assert [request.status for request in proxy.log] == [503] * 3
    assert proxy.bytes_sent() == 0


def test_drop_in_the_middle_of_a_body(raw: Raw, proxy: FaultProxy) -> None:
    proxy.set({"drop": 1})
    with pytest.raises(http.client.IncompleteRead) as caught:
        raw.ask("GET")
    assert CONTENT.startswith(caught.value.partial)
    assert len(caught.value.partial) == proxy.bytes_sent("^GET") < len(CONTENT)
    assert proxy.counts()["drop"] == 1


def test_drop_after_the_store_has_done_it(raw: Raw, proxy: FaultProxy, s3: str) -> None:
    proxy.set({"drop": 1})
    with pytest.raises(http.client.RemoteDisconnected):
        raw.ask("PUT", b"new")
    assert files.read(f"{s3}/object") == b"new"
    with pytest.raises(http.client.RemoteDisconnected):
        raw.ask("DELETE")
    assert not files.exists(f"{s3}/object")
    assert proxy.counts()["drop"] == 2


def test_truncate(raw: Raw, through: Any, proxy: FaultProxy, s3: str) -> None:
    proxy.set({"truncate": 1})
    status, length, body = raw.ask("GET")
    assert (status, length) == (200, len(body))
    assert CONTENT.startswith(body)
    assert len(body) < len(CONTENT)
    assert len(through.cat_file(f"{s3}/object", start=0, end=100_000)) < 100_000
    assert proxy.counts()["truncate"] == 2


def test_wrong(raw: Raw, proxy: FaultProxy) -> None:
    proxy.set({"wrong": 1})
    status, length, body = raw.ask("GET")
    assert (status, length, len(body)) == (200, len(CONTENT), len(CONTENT))
    different = [i for i in range(len(body)) if body[i] != CONTENT[i]]
    assert 0 < len(different) <= 4096
    assert different == list(range(different[0], different[-1] + 1))
    assert proxy.counts()["wrong"] == 1


def test_only_some_requests_are_harmed(raw: Raw, proxy: FaultProxy) -> None:
    proxy.set({"wrong": 1}, only=r"^GET .*/object\?.*$")
    assert raw.ask("PUT", b"new")[0] == 200
    assert raw.ask("GET")[2] != b"new"
    proxy.set({"wrong": 1}, only="/another")
    assert raw.ask("GET")[2] == b"new"
    proxy.set({})
    assert raw.ask("GET")[2] == b"new"
    assert proxy.counts()["wrong"] == 1


def test_the_seed_decides(object_store: ObjectStore) -> None:
    def statuses(seed: int) -> list[int]:
        with FaultProxy(object_store.endpoint, seed, {"slow_down": 0.5}) as proxy:
            connection = http.client.HTTPConnection(proxy.endpoint.removeprefix("http://"))
            found = []
            for _ in range(30):
                connection.request("GET", "/")
                answer = connection.getresponse()
                answer.read()
                found.append(answer.status)
            assert proxy.counts()["slow_down"] == found.count(503)
        return found

    assert set(statuses(1)) == {403, 503}
    assert statuses(1) == statuses(1) != statuses(2)


def test_unknown_faults_are_refused() -> None:
    with pytest.raises(ValueError, match="slowdown"):
        FaultProxy("http://127.0.0.1:1", 0, {"slowdown": 1})
