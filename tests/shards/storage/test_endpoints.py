"""An endpoint that cannot be used is told at once, with what mends it and without secrets."""

import http.server
import threading
import time

import fsspec
import pytest

from shards.errors import InputError
from shards.storage import files, outages, retries
from tests.shards.storage.test_retries import Failing

NO_URL = r"is no URL: it has to begin with http:// or https://, as in AWS_ENDPOINT_URL"
CREDENTIALS = "holds credentials, .* set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


@pytest.fixture(autouse=True)
def _no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF", 0.001)
    monkeypatch.setattr(outages, "_failed", {})
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("127.0.0.1:28555", NO_URL),
        ("store.example", NO_URL),
        ("https://", NO_URL),
        ("ftp://store.example", NO_URL),
        ("https://mine:pa55@store.example", CREDENTIALS),
        ("mine:pa55@store.example", CREDENTIALS),
        ("https://mine:pa/55@store.example", CREDENTIALS),
    ],
)
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^{name} {told}") as error:
        files.exists("s3://bucket/x")
    assert value.rpartition("@")[0] in ("", value) or value not in str(error.value)
    assert "pa55" not in str(error.value)
    assert "mine" not in str(error.value)


def test_an_endpoint_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for S3 alone counts first, and all may be ignored."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no URL")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store.example")
    files.client("s3://bucket/x")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    files.client("s3://bucket/x")


def test_tls_with_a_server_that_speaks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.server_port}"),
            *(("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s")),
            *(("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1")),
        ):
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(OSError, match=r"^s3://bucket/x: the server there speaks plain HTTP: "):
            files.read("s3://bucket/x", 0, 1)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.shutdown()


def test_an_outage_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    failing = Failing(monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda _: clock.__setitem__(0, clock[0] + 6))

    def read(failures: int) -> list[str]:
        failing.errors = [TimeoutError(f"no\nanswer {i}") for i in range(failures)]
        files.read("memory://failing")
        return capsys.readouterr().err.splitlines()

    assert read(1) == [], "it passed soon"
    line = "memory://failing: a request is tried again, for up to 120 s: timed out no answer 1"
    assert read(4) == [line]
    assert read(4) == [], "the same outage"
    clock[0] += 200
    assert read(2) == [line]


def test_a_local_disk_has_no_outages(capsys: pytest.CaptureFixture[str]) -> None:
    failures = [OSError("stale")]

    def call() -> None:
        if failures:
            raise failures.pop()

    retries.retry("/somewhere", call)
    outages.note("s3://user:pa55@bucket/x", "r", 3, 120)
    assert capsys.readouterr().err == ""
    outages.note("s3://user:pa55@bucket/x", "r", 6, 120)
    assert capsys.readouterr().err.startswith("s3://bucket: a request")
