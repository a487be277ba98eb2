"""Full disks: every way of writing names the place and the space, and leaves nothing half done."""

import contextlib
import errno
import io
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.log.events import EventLog
from engine.log.journal import Journal
from shards.storage import exclusive, files, local_files, upload
from shards.storage.space import format_size, is_full, naming_space
from tests.helpers.small_disk import small_disk

SIZE = 3_000_000


def write(folder: str) -> None:
    files.write(f"{folder}/object", bytes(SIZE))


def create(folder: str) -> None:
    exclusive.create(f"{folder}/object", bytes(SIZE))


def download(folder: str) -> None:
    files.write("memory://space/source", bytes(SIZE))
    files.download("memory://space/source", SIZE, f"{folder}/object")


def stream(folder: str) -> None:
    with upload.open_writer(f"{folder}/object") as file:
        for _ in range(3):
            file.write(bytes(SIZE // 3))


def stream_behind_torch(folder: str) -> None:
    """torch.save raises another error in place of that of the stream."""
    with upload.open_writer(f"{folder}/object") as file:
        try:
            file.write(bytes(SIZE))
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598") from None


def log(folder: str) -> None:
    journal = Journal(folder, 0)
    journal.write({"step": 1, "text": "x" * SIZE})
    journal.flush()


def note(folder: str) -> None:
    events = EventLog(folder, None)
    events.scalars({"x" * SIZE: 1.0}, 1)
    events.flush()


WRITERS = [write, create, download, stream, stream_behind_torch, log, note]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 2 MB."""
    with small_disk(tmp_path / "disk", 2000):
        yield tmp_path / "disk"


@pytest.mark.parametrize("call", WRITERS, ids=lambda f: f.__name__)
def test_a_full_disk_is_named_with_its_space(call: Callable[[str], None], disk: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device; needed at least 3.0 MB, free \d"):
        call(str(disk))
    left = [path for path in disk.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name == "object" or path.suffix == ".partial"]


@pytest.mark.parametrize("call", [stream, stream_behind_torch, log, note])
def test_errors_that_nobody_prefixes_name_the_file(call: Callable[[str], None], disk: Path) -> None:
    with pytest.raises(OSError, match=f"^{disk}/.*: No space left"):
        call(str(disk))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, r"No space left on device; needed at least [13].0 MB, free [\d.,]+ \wB"),
        (
            errno.EDQUOT,
            "Disk quota exceeded; needed at least [13].0 MB, .* the quota is used up",
        ),
        (errno.EFBIG, "File too large; needed at least [13].0 MB"),
    ],
)
@pytest.mark.parametrize("call", WRITERS[:-2], ids=lambda f: f.__name__)
def test_every_kind_of_full_disk_is_reported_at_once(
    call: Callable[[str], None],
    number: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[str] = []

    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(number, os.strerror(number))

    @contextlib.contextmanager
    def new_file(path: str) -> Iterator[Any]:
        tries.append(path)
        yield Full(), path

    monkeypatch.setattr(local_files, "new_file", new_file)
    with pytest.raises(OSError, match=text):
        call(str(tmp_path))
    assert len(tries) == 1


def test_a_limit_of_the_shell_is_named(tmp_path: Path) -> None:
    program = f"from shards.storage import files; files.write({str(tmp_path / 'a')!r}, bytes(9000))"
    found = subprocess.run(
        [sys.executable, "-c", program],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
        capture_output=True,
        text=True,
        check=False,
    )
    told = "File too large; needed at least 9.0 kB, allowed for a file 4.0 kB (ulimit -f)"
    assert told in found.stderr


def test_other_errors_pass() -> None:
    with pytest.raises(PermissionError, match="mine"), naming_space("/x", lambda: 1, "/x"):
        raise PermissionError("mine")
    assert not is_full(OSError(errno.EIO, ""))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (2e7, "20.0 MB"),
        (3.2e12, "3,200.0 GB"),
    ],
)
def test_sizes(size: float, text: str) -> None:
    assert format_size(size) == text
