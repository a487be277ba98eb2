"""Requests are retried a bounded number of times, with growing waits, where it can help."""

import errno
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from shards.storage import files, retries

CONTENT = np.random.default_rng(0).bytes(100)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF", 0.001)


class Failing:
    """A read of `memory://` that raises these before it succeeds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0
        self.waits: list[float] = []
        files.write("memory://failing", CONTENT)
        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", self.cat_file)
        monkeypatch.setattr(time, "sleep", self.waits.append)

    def cat_file(self, _: str, start: int | None = None, end: int | None = None) -> bytes:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return CONTENT[start:end]


def test_passing_errors_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(monkeypatch, TimeoutError(), ConnectionResetError(104, "reset"), OSError("x"))
    assert files.read("memory://failing", 3, 9) == CONTENT[3:9]
    assert failing.calls == 4


def test_tries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(monkeypatch, *[OSError(f"broke\nfor the {i}th time") for i in range(99)])
    told = f"tries in 0 s: broke for the {retries.ATTEMPTS - 1}th time"
    with pytest.raises(
        OSError, match=rf"^memory://failing: gave up after {retries.ATTEMPTS} {told}$"
    ):
        files.read("memory://failing")
    assert failing.calls == retries.ATTEMPTS


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF", 0.2)
    failing = Failing(monkeypatch, *[OSError("broke")] * 999)
    found = []
    for _ in range(20):
        failing.waits.clear()
        with pytest.raises(OSError, match="gave up"):
            files.read("memory://failing")
        found.append(list(failing.waits))
    waits = np.array(found)  # [runs, ATTEMPTS - 1]
    planned = np.minimum(0.2 * 2.0 ** np.arange(retries.ATTEMPTS - 1), retries.LONGEST_WAIT)
    assert waits.shape == (20, retries.ATTEMPTS - 1)
    assert (waits >= 0.5 * planned).all()
    assert (waits <= 1.5 * planned).all()
    assert len(np.unique(waits)) == waits.size
    assert planned.sum() > 20  # a store that is away for a while is waited for


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No try begins after TRY_FOR, however few there were."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    failing = Failing(monkeypatch, *[OSError("slow")] * 99)
    monkeypatch.setattr(time, "sleep", lambda _: clock.__setitem__(0, clock[0] + 50))
    with pytest.raises(OSError, match="gave up after 4 tries in 150 s: slow"):
        files.read("memory://failing")
    assert failing.calls == 4


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("x"), PermissionError("x"), ValueError("x"), OSError(errno.ENOSPC, "x")],
)
def test_hopeless_errors_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing = Failing(monkeypatch, *[error] * 9)
    kind = type(error) if isinstance(error, OSError) else OSError
    with pytest.raises(kind, match=r"^memory://failing: .*x$") as caught:
        files.read("memory://failing")
    assert type(caught.value) is kind
    assert failing.calls == 1


def test_a_wrong_length_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [b"", b"short", CONTENT, CONTENT[:10]]
    monkeypatch.setattr(
        fsspec.get_filesystem_class("memory"), "cat_file", lambda *_, **__: answers.pop(0)
    )
    assert files.read("memory://x", 0, 10) == CONTENT[:10]
    answers += [b"short"] * 9
    told = "^memory://x: gave up after 4 tries in 0 s: bytes 20 to 30: 5 of 10 bytes came$"
    with pytest.raises(retries.WrongLength, match=told):
        files.read("memory://x", 20, 30)
    assert len(answers) == 9 - retries.CONTENT_ATTEMPTS


def test_a_local_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"content")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("a second try"))
    with pytest.raises(retries.WrongLength, match=r"file: bytes 3 to 9: 4 of 6 bytes came"):
        files.read(f"{tmp_path}/file", 3, 9)
    with pytest.raises(FileNotFoundError):
        files.read(f"{tmp_path}/none")


@pytest.mark.parametrize("name", ["n" * 256, "loop/a"])
def test_a_path_at_fault_is_told_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for call in (files.read, lambda url: files.write(url, CONTENT)):
        with pytest.raises(OSError, match=r"File name too long|symbolic links|is no folder"):
            call(f"{tmp_path}/{name}")
    assert not waits
