"""Commands that write to a place where that is not allowed: one line names folder and remedy."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import evaluate, export, pack, train
from shards.loader import DataConfig
from shards.storage import exclusive, files
from shards.storage.local_files import NotWritable, proposing
from tests.helpers import jobs, tiny
from tests.helpers.small_disk import forbid_writing, small_disk

Capture = pytest.CaptureFixture[str]
READ_ONLY = "may not be written to (Read-only file system)"


@pytest.fixture(scope="module")
def disk(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk with a run, on which nothing can be written."""
    folder = tmp_path_factory.mktemp("disks") / "disk"
    with small_disk(folder, 64_000):
        shutil.copytree(whole_run, folder / "run")
        forbid_writing(folder)
        yield folder


@pytest.mark.parametrize(
    ("command", "place", "remedy"),
    [
        (["knn", "RUN"], "run", "give --out, a folder elsewhere"),
        (["knn", "RUN/checkpoints/step_00000012"], "run", "give --out, a folder elsewhere"),
        (["knn", "RUN", "--out", "DISK/other"], "", "give another --out"),
        (["linear", "RUN", "--fast"], "run", "give --out, a folder elsewhere"),
        (["neighbours", "RUN"], "run", "give --out, a folder elsewhere"),
        (["report", "RUN"], "run", "give --out, a file elsewhere"),
        (["report", "RUN", "--out", "DISK/a/b.html"], "", "give another --out"),
        (["features", "RUN", "VAL", "DISK/f.npz"], "", "choose another OUT"),
        (["export", "RUN", "DISK/out", "--format", "safetensors"], "", "choose another OUT"),
    ],
)
def test_read_only_disks(
    disk: Path,
    tiny_data: DataConfig,
    capsys: Capture,
    command: list[str],
    place: str,
    remedy: str,
) -> None:
    names = {"RUN": f"{disk}/run", "DISK": str(disk), "VAL": tiny_data.val}
    for name, value in names.items():
        command = [one.replace(name, value) for one in command]
    main = export.main if command[0] == "export" else evaluate.main
    assert main(command[command[0] == "export" :]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {(disk / place).resolve()}: {READ_ONLY}: {remedy}"


def test_a_training_on_a_read_only_disk(disk: Path, tiny_data: DataConfig, capsys: Capture) -> None:
    data = str(Path(tiny_data.train).parent)
    assert train.main(jobs.small(data, f"{disk}/new/run")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {disk}: {READ_ONLY}: give another --run-url"
    with pytest.raises(NotWritable, match=f"^{disk}/run(/lease)?: may not be written to"):
        train.train(tiny.recipe(tiny_data, disk / "run"))


def test_no_folder_can_be_made_in_proc(photo_folder: Path) -> None:
    text = "^/proc: may not be written to .*: choose another OUT than /proc/xx$"
    with pytest.raises(NotWritable, match=text):
        pack.main((str(photo_folder), "/proc/xx"), threads=1)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_all_ways_of_writing_tell_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(name: str, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), name)

    url = str(tmp_path / "a" / "b.json")
    for target, place in (("os.makedirs", tmp_path), ("builtins.open", tmp_path / "a")):
        for write in (files.write, exclusive.create):
            with monkeypatch.context() as patch:
                patch.setattr(target, refuse)
                with pytest.raises(NotWritable) as failure:
                    write(url, b"x")
            assert str(failure.value) == f"{place}: may not be written to ({os.strerror(number)})"
            assert failure.value.errno == number
        (tmp_path / "a").mkdir(exist_ok=True)


def test_a_remedy_is_for_its_own_folder(tmp_path: Path) -> None:
    error = NotWritable("text", str(tmp_path / "run" / "file"))
    with pytest.raises(NotWritable, match=r"^text: mend$"), proposing("mend", f"{tmp_path}/run/"):
        raise error
    for other in (f"{tmp_path}/ru", f"{tmp_path}/run/file/x", "s3://bucket/run"):
        with pytest.raises(NotWritable, match=r"^text$"), proposing("mend", other):
            raise error
