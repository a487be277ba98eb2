"""Tars are read by name and size: whatever stands in one, nothing is extracted or executed."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from shards import index
from shards.loader import Assignment, DataConfig, TrainLoader
from shards.order import Order
from shards.views import ViewsConfig
from tests.conftest import draw_photo
from tests.helpers.tars import make_index

LINKS = {"a": tarfile.SYMTYPE, "b": tarfile.LNKTYPE}
DEVICES = {"c": tarfile.CHRTYPE, "d": tarfile.BLKTYPE, "e": tarfile.FIFOTYPE}


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def write_tar(path: Path, planted: Path) -> None:
    """Samples with images under names that lead elsewhere, among members that are no files."""
    payload = pickle.dumps(Planted(planted))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, content: bytes = b"", **header: object) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in header.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))

        for i, name in enumerate(("../../up", f"{planted}/absolute", "/root/down", "0000")):
            add(f"{name}.jpg", draw_photo(i, 20, 20))
            add(f"{name}.cls", str(i).encode())
            for extension in ("pyd", "pickle", "pth", "__init__.py"):
                add(f"{name}.{extension}", payload)
        for name, kind in LINKS.items():
            add(f"{name}.jpg", type=kind, linkname="/etc/passwd")
        for name, kind in DEVICES.items():
            add(f"{name}.jpg", type=kind, devmajor=1, devminor=5)
        add("folder.jpg", type=tarfile.DIRTYPE, mode=0o777)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "one" / "two" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    write_tar(tmp_path / "evil.tar", tmp_path / "planted")
    before = tree(tmp_path)
    found = make_index(str(tmp_path))
    assert found.samples == 4
    loader = TrainLoader(
        Assignment(
            Order(index.load(str(tmp_path), "data.train"), 0, 1, 4),
            range(1),
            ViewsConfig(size=16),
            DataConfig(),
            threads=1,
        ),
        print,
    )
    for _ in range(2):
        batch = next(loader)
        assert sorted(batch.labels.tolist()) == [0, 1, 2, 3]
    assert loader.faults.count == 0
    loader.close()
    assert tree(tmp_path) == before | {"index.json"}


def test_the_planted_pickle_would_have_worked(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Planted(tmp_path / "planted")))
    assert (tmp_path / "planted").is_dir()
