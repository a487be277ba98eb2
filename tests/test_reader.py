"""Blocks are what was packed, or that is told."""

import zlib
from pathlib import Path
from typing import Any

import pytest

from shards import index, storage, synthetic
from shards.index import Index
from shards.reader import BlockReader


@pytest.fixture(params=["local", "remote"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Index:
    url = str(tmp_path) if request.param == "local" else f"memory://reader{tmp_path}"
    synthetic.write(url, 64, 32, seed=0)
    return index.load(url, "data.train")


def flipped(content: bytes) -> bytes:
    """One bit of the first image's pixels is another: the tar and the image stay whole."""
    place = 512 + 300
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_the_index_has_the_crc_of_each_block(data: Index) -> None:
    for number, shard in enumerate(data.shards):
        ranges = [data.block_range(number, block) for block in range(len(data.blocks(number)))]
        url = data.shard_url(number)
        assert shard.crcs == [zlib.crc32(storage.read(url)[start:stop]) for start, stop in ranges]


@pytest.mark.parametrize("times", [1, 100])
def test_a_flipped_bit(data: Index, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []
    reader = BlockReader(data, report=reports.append)
    sound = bytes(reader.fetch(0, 0).content)
    assert not reports
    left, read = [times], storage.read

    def damaged(*arguments: Any) -> bytes:
        content = read(*arguments)
        left[0] -= 1
        return flipped(content) if left[0] >= 0 else content

    monkeypatch.setattr(storage, "read", damaged)
    monkeypatch.setattr(storage, "pause", lambda _: None)
    again = times == 1 and not storage.is_local(data.url)  # a disk says the same twice
    assert bytes(reader.fetch(0, 0).content) == (sound if again else flipped(sound))
    reader.fetch(0, 0)
    (report,) = reports
    assert "not what was packed, its CRC32 differs" in report


def test_sets_without_crcs_are_read_as_before(data: Index) -> None:
    """Those that others packed, of which only headers were read, and those of older indexes."""
    for shard in data.shards:
        shard.crcs = None
    data.save()
    found = index.load(data.url, "data.train")
    assert found.digest == data.digest
    assert found.shards[0].crcs is None
    BlockReader(found).fetch(0, 0)
