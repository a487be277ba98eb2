"""Reading small parts of a remote file: what is read, and how many bytes that takes."""

import io
import random
from pathlib import Path

import pytest

from shards.samples import Layout, group_samples
from shards.storage import files, skim
from shards.storage.skim import open_skim
from shards.tar import read_members
from tests.helpers.tars import write_tar


class Counted:
    """Counts the bytes that reads of ranges take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = self.requests = 0
        plain = files.read

        def read(url: str, start: int, stop: int) -> bytes:
            self.bytes += stop - start
            self.requests += 1
            return plain(url, start, stop)

        monkeypatch.setattr(files, "read", read)


def write_remote(tmp_path: Path, name: str, sizes: list[int], others: int = 1) -> tuple[str, bytes]:
    members = {}
    for i, size in enumerate(sizes):
        members[f"{i:06d}.cls"] = b"1"
        members[f"{i:06d}.jpg"] = bytes([i % 251]) * size
        members |= {f"{i:06d}.{chr(ord('p') + k)}": b"{}" for k in range(others)}
    content = write_tar(tmp_path / name, members).read_bytes()
    url = f"memory://skim/{name}"
    files.write(url, content)
    return url, content


@pytest.mark.parametrize(
    ("size", "share"), [(400_000, 0.05), (100_000, 0.2), (30_000, 0.6), (5_000, 1.0), (300, 1.0)]
)
def test_headers_and_labels_take_few_of_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, share: float
) -> None:
    rng = random.Random(0)
    sizes = [int(size * rng.uniform(0.5, 1.5)) for _ in range(12_000_000 // size)][:4000]
    url, content = write_remote(tmp_path, f"{size}.tar", sizes)
    counted = Counted(monkeypatch)
    labels = 0
    with open_skim(url) as file:
        for sample in group_samples(read_members(file, whole=True), Layout()):
            assert sample.label is not None
            file.seek(sample.label[0])
            labels += file.read(sample.label[1]) == b"1"
    assert labels == len(sizes)
    assert counted.bytes <= share * len(content)
    assert counted.requests <= 2 * len(sizes)


def test_every_read_is_that_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random reads and seeks, forward and back, give what the same ones of a local file give."""
    monkeypatch.setattr(skim, "LEAST", 64)
    monkeypatch.setattr(skim, "MOST", 512)
    content = random.Random(1).randbytes(20_000)
    files.write("memory://skim/random", content)
    rng = random.Random(2)
    with open_skim("memory://skim/random") as file, io.BytesIO(content) as plain:
        for _ in range(2000):
            near = plain.tell() + rng.randrange(99)
            offset = rng.randrange(21_000) if rng.random() < 0.3 else near
            size = rng.choice([0, 1, 20, 100, 1000])
            assert file.seek(offset) == plain.seek(offset)
            assert file.read(size) == plain.read(size)
            assert file.tell() == plain.tell()
        assert file.seek(0, io.SEEK_END) == len(content)
