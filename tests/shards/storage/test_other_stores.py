"""Stores that lack something, and what stands before them: worked around, or told in one line."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from engine.state import checkpoint, lease, saver
from engine.state.checkpoint import CheckpointConfig
from launch import evaluate, export
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import exclusive, files, retries, s3, upload
from tests.engine.state.test_checkpoint import ALONE
from tests.helpers import tiny
from tests.helpers.fault_proxy import FaultProxy, Quirk
from tests.helpers.leases import leave
from tests.helpers.object_store import ObjectStore
from tests.helpers.training import train

WRITES = "^(PUT|POST|DELETE) "
LISTS = "^GET .*list-type"
PAGE = Quirk(200, "", "Please log in")
UNKNOWN = "A header you provided implies functionality that is not implemented."
EXPIRED = Quirk(400, "ExpiredToken", "The provided token has expired.")
NO_CHECKSUMS = Quirk(
    *(501, "NotImplemented", "Header 'x-amz-checksum-crc32' not implemented", "^PUT"),
    header="^x-amz-(checksum-|sdk-checksum|trailer)",
)
NO_CONDITIONS = Quirk(501, "NotImplemented", UNKNOWN, "^PUT", header="^if-none-match")


def stream(url: str, size: int = 11 << 20) -> None:
    with upload.open_writer(url, part=5 << 20) as file:
        file.write(bytes(size))


WAYS: dict[str, Callable[[str], Any]] = {
    "write": lambda url: files.write(url, b"1"),
    "stream": stream,
    "create": lambda url: exclusive.create(url, b"1"),
    "read": files.read,
    "range": lambda url: files.read(url, 0, 1),
    "size": files.size,
    "exists": files.exists,
    "list": files.list_names,
    "walk": lambda url: list(files.walk(url)),
    "remove": files.remove,
}


def failure(way: str, url: str) -> str:
    with pytest.raises(OSError, match=r"^s3://") as caught:
        WAYS[way](url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("status", [200, 403, 503])
def test_a_web_page_is_no_store(way: str, status: int, proxy: FaultProxy, s3: str) -> None:
    files.write(f"{s3}/object", b"content")
    proxy.refuse(Quirk(status, "", "Please log in"))
    text = failure(way, f"{s3}/object")
    assert "a web page" in text
    assert "credentials" not in text


@pytest.mark.parametrize(
    ("page", "kind", "ways"),
    [
        ("<html>Please <br> log in", "text/html; charset=utf-8", WAYS),  # no XML
        ("<html>Please log in</html>", "application/xml", ("write", "read", "size", "list")),
        # For other requests, botocore makes a failure of the server of what is no XML.
        ("{}", "application/json", ("read", "range", "size", "exists")),
    ],
)
def test_pages_that_look_otherwise(
    page: str, kind: str, ways: Iterable[str], proxy: FaultProxy, s3: str
) -> None:
    class Odd(Quirk):
        def answer(self, _: Any) -> tuple[bytes, str]:
            return page.encode(), kind

    proxy.refuse(Odd(200, "", ""))
    for way in ways:
        assert "a web page" in failure(way, f"{s3}/object")


@pytest.mark.parametrize(
    ("quirk", "told", "tries"),
    [
        (NO_CHECKSUMS, "AWS_REQUEST_CHECKSUM_CALCULATION=when_required", 1),
        (Quirk(501, "NotImplemented", UNKNOWN), "AWS_REQUEST_CHECKSUM_CALCULATION", 1),
        (
            Quirk(403, "SignatureDoesNotMatch", "Access denied."),
            "works, set AWS_REQUEST_CHECKSUM",
            1,
        ),
        (Quirk(403, "QuotaExceeded", "Bucket quota exceeded"), "the store is full", 4),
        (Quirk(400, "XMinioAdminBucketQuotaExceeded", "Bucket quota exceeded"), "is full", 4),
        (Quirk(403, "AccessDenied", "Cannot upload files, storage cap exceeded"), "is full", 4),
        (Quirk(507, "XMinioStorageFull", "Please delete a few"), "the store is full", 4),
        (Quirk(403, "RequestTimeTooSkewed", "Too large"), "this machine's clock is wrong", 1),
        (EXPIRED, "the credentials have expired", 4),
        (Quirk(403, "AccessDenied", "Access Denied."), "may lack s3:PutObject", 1),
        (Quirk(403, "InvalidAccessKeyId", "No such key"), "are not accepted: set AWS_ACC", 1),
    ],
)
def test_what_a_store_says_is_told(
    quirk: Quirk, told: str, tries: int, proxy: FaultProxy, s3: str
) -> None:
    proxy.refuse(quirk)
    text = failure("write", f"{s3}/object")
    assert told in text
    assert quirk.message.rstrip(".") in text
    about = ("access denied: ", "expired")
    assert ("credentials" in text) == any(word in text for word in about)
    assert proxy.requests("/object", "PUT") == tries


def test_a_head_that_is_refused_has_its_reason_told(proxy: FaultProxy, s3: str) -> None:
    """The answer to a HEAD has no body."""
    proxy.refuse(Quirk(403, "RequestTimeTooSkewed", "Too large", "^(HEAD|GET)"))
    assert "clock" in failure("exists", f"{s3}/object")


def test_without_checksums_where_they_are_not_required(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.refuse(NO_CHECKSUMS)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files.write(f"{s3}/object", b"1")
    stream(f"{s3}/large")
    assert files.size(f"{s3}/large") == 11 << 20


def test_without_heads(proxy: FaultProxy, s3: str) -> None:
    files.write(f"{s3}/object", b"content")
    files.write(f"{s3}/empty", b"")
    proxy.refuse(Quirk(403, "AccessDenied", "", "^HEAD"))
    assert files.size(f"{s3}/object") == 7
    assert files.size(f"{s3}/empty") == 0
    assert [files.exists(f"{s3}/{name}") for name in ("object", "other")] == [True, False]
    files.remove(f"{s3}/object")
    assert not files.exists(f"{s3}/object")


def test_without_lists(proxy: FaultProxy, s3: str) -> None:
    files.write(f"{s3}/object", b"content")
    proxy.deny(LISTS)
    assert [files.exists(f"{s3}/{name}") for name in ("object", "other")] == [True, False]
    assert "may lack s3:ListBucket" in failure("list", s3)
    with pytest.raises(InputError, match=r"give the URL of one checkpoint, such as s3://.*step_"):
        checkpoint.find(f"{s3}/run", ALONE, print)


# Exclusive create --------------------------------------------------------------------------------


def ignore_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send no conditions, which to a store's clients is as if it ignored them."""
    kind = s3._filesystem_class()
    call = kind._call_s3

    async def call_without(self: Any, *args: Any, **fields: Any) -> Any:
        fields.pop("IfNoneMatch", None)
        return await call(self, *args, **fields)

    monkeypatch.setattr(kind, "_call_s3", call_without)


@pytest.mark.parametrize("how", ["refuses", "ignores"])
def test_without_exclusive_create(
    how: str,
    proxy: FaultProxy,
    s3: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if how == "refuses":
        proxy.refuse(NO_CONDITIONS)
    else:
        ignore_conditions(monkeypatch)
    text = failure("create", f"{s3}/object")
    assert f"{how} exclusive create (If-None-Match)" in text
    assert "set BYOL_EXCLUSIVE_CREATE=no" in text
    assert not files.exists(f"{s3}/object")

    monkeypatch.setenv("BYOL_EXCLUSIVE_CREATE", "no")
    monkeypatch.setattr(exclusive, "SETTLE", 0.0)
    assert exclusive.create(f"{s3}/object", b"1")
    assert not exclusive.create(f"{s3}/object", b"2")
    assert files.read(f"{s3}/object") == b"1"
    told: list[str] = []
    held = lease.acquire(f"{s3}/run", ["me"], 9, told.append)
    assert "BYOL_EXCLUSIVE_CREATE=no" in told[0]
    assert "both train there for up to 9 s" in told[0]
    leave(f"{s3}/run", 1, owner="another", host="far")  # as if it had begun at the same moment
    with pytest.raises(InputError, match=r"was taken over by another job \(far\)"):
        held.confirm()
    held.release()


def test_a_race_without_exclusive_create_has_one_winner(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BYOL_EXCLUSIVE_CREATE", "no")
    other = iter([lambda: files.write(f"{s3}/object", b"another's")])
    monkeypatch.setattr(time, "sleep", lambda _: next(other)())
    assert not exclusive.create(f"{s3}/object", b"mine")


def test_the_variable_is_checked(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYOL_EXCLUSIVE_CREATE", "maybe")
    with pytest.raises(InputError, match="BYOL_EXCLUSIVE_CREATE must be yes or no, not 'maybe'"):
        lease.acquire(f"{s3}/run", ["me"], 9, print)


# Multipart uploads -------------------------------------------------------------------------------


def test_without_multipart_uploads(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.refuse(Quirk(501, "NotImplemented", "No multipart uploads", "^POST .*uploads"))
    stream(f"{s3}/object")
    assert files.read(f"{s3}/object") == bytes(11 << 20)
    assert proxy.requests("^POST .*uploads") == 1
    monkeypatch.setattr(upload, "WHOLE", 10 << 20)
    text = failure("stream", f"{s3}/large")
    assert "no multipart uploads, which an object of more than 10 MiB needs" in text
    assert not files.exists(f"{s3}/large")


# Credentials that expire -------------------------------------------------------------------------


def test_renewed_credentials_are_taken(
    proxy: FaultProxy,
    object_store: ObjectStore,
    s3: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of a profile, which something else renews."""

    def renew(key: str) -> None:
        path.write_text(
            f"[default]\naws_access_key_id = {key}\n"
            f"aws_secret_access_key = {object_store.secret_key}\n"
        )

    files.write(f"{s3}/object", b"content")
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    renew("OLD")
    proxy.refuse(Quirk(400, "ExpiredToken", "It has expired.", header="Credential=OLD"))
    monkeypatch.setattr(retries, "pause", lambda _: renew(object_store.access_key))
    for way in ("read", "list", "exists", "write", "stream"):
        renew("OLD")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        WAYS[way](f"{s3}/object")
        assert proxy.log[-1].status < 300


def test_a_checkpoint_for_which_credentials_were_too_old_does_not_end_the_run(
    proxy: FaultProxy,
    s3: str,
    tiny_data: DataConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(saver, "BACKOFF", 0.0)
    proxy.refuse(Quirk(400, "ExpiredToken", "It has expired.", "^PUT .*step_00000001"))
    config = CheckpointConfig(every=1, keep=1)
    recipe = tiny.recipe(tiny_data, f"{s3}/run", checkpoint=config, steps=2, probe=tiny.NO_PROBE)
    assert train(recipe)
    assert "the credentials have expired" in capsys.readouterr().out
    assert checkpoint.steps(recipe.run) == [2]


# Whole programs ----------------------------------------------------------------------------------


def test_a_bucket_that_can_only_be_read(
    proxy: FaultProxy,
    s3: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Data and another run's checkpoint come from it, by GETs alone."""
    data = tiny.draw_data(tmp_path / "data")
    places = DataConfig(train=f"{s3}/train", val=f"{s3}/val", streams=data.streams)
    for part in ("train", "val"):
        for path in (tmp_path / "data" / part).iterdir():
            files.write(f"{s3}/{part}/{path.name}", path.read_bytes())
    train(tiny.recipe(places, f"{s3}/run", steps=2, probe=tiny.NO_PROBE))
    # Where it allows no lists, AWS also refuses what is not there.
    nothing = r"^GET [^?]*(step_00000002|run/commit\.json)(\?|$)"
    proxy.deny(f"{WRITES}|^HEAD |{LISTS}|{nothing}")
    start = CheckpointConfig(resume=f"{s3}/run/checkpoints/step_00000002")
    recipe = tiny.recipe(places, tmp_path / "run", steps=3, probe=tiny.NO_PROBE, checkpoint=start)
    capsys.readouterr()
    train(recipe)
    assert "resumed at step 2" in capsys.readouterr().out
    options = ["--format", "safetensors"]
    assert export.main([start.resume, str(tmp_path / "out"), *options]) == 0
    with pytest.raises(OSError, match=r"s3://.*may lack s3:(PutObject|ListBucket)"):
        train(tiny.recipe(places, f"{s3}/other", steps=3, probe=tiny.NO_PROBE))
    with pytest.raises(InputError, match="give the URL of one checkpoint"):
        checkpoint.find(f"{s3}/run", ALONE, print)
    capsys.readouterr()
    assert evaluate.main(["knn", start.resume, "--k", "3"]) == 1
    assert "; or give --out" in capsys.readouterr().err
    assert evaluate.main(["knn", start.resume, "--k", "3", "--out", str(tmp_path / "out")]) == 0
