"""File systems and permissions as people have them: no hard links, no fsync, folders not theirs."""

import contextlib
import errno
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch import pack as pack_command
from shards.errors import InputError
from shards.loader import DataConfig
from shards.making.image_folders import find_images
from shards.storage import exclusive, files, local_files, retries, upload
from tests.conftest import draw_photo
from tests.helpers import tiny
from tests.helpers.training import finish, open_trainer

NO_LINKS = [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EINVAL]
CANNOT = [errno.ENOSPC, errno.EROFS, errno.EDQUOT]


def refuse(number: int) -> object:
    """A system call that fails so."""

    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


# No hard links -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", NO_LINKS, ids=errno.errorcode.get)
def test_created_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", refuse(number))
    monkeypatch.setattr(retries, "pause", lambda _: pytest.fail("it was tried again"))
    path = tmp_path / "folder" / "1.json"
    assert exclusive.create(str(path), b"first")
    assert not exclusive.create(str(path), b"second")
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_one_of_many_wins_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    contents = [bytes([i]) * 10_000 for i in range(32)]
    for number in range(10):
        path = str(tmp_path / f"{number}.json")
        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(lambda content, p=path: exclusive.create(p, content), contents))
        assert won.count(True) == 1
        assert files.read(path) == contents[won.index(True)]


@pytest.mark.parametrize("number", CANNOT, ids=errno.errorcode.get)
def test_what_no_other_way_would_help_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        exclusive.create(str(tmp_path / "file"), b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_part_of_a_created_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    path = tmp_path / "file"
    monkeypatch.setattr(local_files, "_fill", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        exclusive.create(str(path), b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_that_is_told_at_the_close_leaves_none_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def close(self) -> None:
            if not self.closed:
                super().close()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def without_links(*_: object) -> None:
        monkeypatch.setattr(local_files, "open", Full, raising=False)
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", without_links)
    with pytest.raises(OSError, match="No space left"):
        exclusive.create(str(tmp_path / "file"), b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "fsync", refuse(number))
    with upload.open_writer(str(tmp_path / "file")) as stream:
        stream.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="file: "), upload.open_writer(f"{tmp_path}/file") as stream:
        stream.write(b"other")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_run_on_such_a_file_system(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    for steps, begun in ((2, 0), (3, 2)):
        trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, steps=steps, probe=tiny.NO_PROBE))
        assert trainer.step == begun
        finish(trainer)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


# Folders that may not be read --------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may read."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o777)
    for name in ("ant", "bee", "cat"):
        (made / "photos" / name).mkdir(parents=True)
        for i in range(4):
            (made / "photos" / name / f"{i}.jpg").write_bytes(draw_photo(i, 20, 20))
    (made / "out").mkdir()
    (made / "out").chmod(0o777)
    yield made
    shutil.rmtree(made)


@contextlib.contextmanager
def as_a_user() -> Iterator[None]:
    """Without root's rights, to which no permission is missing."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(54321)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("below", ["", "cat", "cat/inner"])
def test_an_unreadable_folder_is_named(folder: Path, below: str) -> None:
    """Not a data set without that class."""
    closed = folder / "photos" / below
    closed.mkdir(exist_ok=True)
    closed.chmod(0)
    try:
        with as_a_user(), pytest.raises((InputError, PermissionError)) as error:
            find_images(str(folder / "photos"))
    finally:
        closed.chmod(0o755)
    text = str(error.value)
    assert str(closed) in text
    assert "\n" not in text
    assert "Permission denied" in text


def test_packing_stops_at_what_may_not_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for closed in (folder / "photos" / "cat" / "1.jpg", folder / "photos" / "cat"):
        closed.chmod(0)
        source, out = str(folder / "photos"), str(folder / "out" / closed.name)
        with as_a_user(), pytest.raises((InputError, OSError), match=str(closed)):
            pack_command.main((source, out), threads=1)
        assert not (folder / "out" / closed.name / "index.json").exists()
        assert "samples" not in capsys.readouterr().out
        closed.chmod(0o755)
    with as_a_user():
        pack_command.main((str(folder / "photos"), str(folder / "out" / "all")), threads=1)
    assert "12 samples, 3 classes" in capsys.readouterr().out


def test_a_file_in_place_of_a_folder_is_no_unreadable_one(folder: Path) -> None:
    with pytest.raises(InputError, match="no images there; give the folder"):
        find_images(str(folder / "photos" / "ant" / "0.jpg"))


def test_an_unreadable_folder_of_shards_is_no_empty_one(folder: Path) -> None:
    closed = folder / "photos"
    closed.chmod(0)
    try:
        with as_a_user(), pytest.raises(PermissionError, match=str(closed)):
            files.list_names(str(closed))
    finally:
        closed.chmod(0o755)


# Files where folders have to be -------------------------------------------------------------------


def upload_to(url: str) -> None:
    with upload.open_writer(url) as file:
        file.write(b"a")


WAYS = (
    files.read,
    lambda url: files.write(url, b"a"),
    lambda url: exclusive.create(url, b"a"),
    upload_to,
)


@pytest.mark.parametrize("name", ["file/1.json", "file/folder/1.json"])
def test_a_file_in_the_way_is_named(name: str, tmp_path: Path) -> None:
    """An exclusive create would otherwise take it for the file of another process."""
    (tmp_path / "file").touch()
    url, text = f"{tmp_path}/{name}", f"{tmp_path}/file: is no folder, and .*(needed|cannot lie)"
    for way in WAYS:
        with pytest.raises(OSError, match=text):
            way(url)
    assert files.list_names(url) == []
    assert not files.exists(url)
