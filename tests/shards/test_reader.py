"""Blocks are what was packed, or that is told."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import index
from shards.center_crops import CropReader
from shards.index import Index
from shards.making import synthetic
from shards.reader import BlockReader
from shards.samples import Block
from shards.storage import files, retries


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
        assert shard.crcs == [zlib.crc32(files.read(url)[start:stop]) for start, stop in ranges]


@pytest.mark.parametrize("times", [1, 100])
def test_a_flipped_bit(data: Index, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []
    reader = BlockReader(data, report=reports.append)
    sound = bytes(reader.fetch(0, 0).content)
    assert not reports
    left, read = [times], files.read

    def damaged(*arguments: Any) -> bytes:
        content = read(*arguments)
        left[0] -= 1
        return flipped(content) if left[0] >= 0 else content

    monkeypatch.setattr(files, "read", damaged)
    monkeypatch.setattr(retries, "pause", lambda _: None)
    again = times == 1 and not files.is_local(data.url)  # a disk says the same twice
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


def test_evaluation_of_given_samples(packed: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """They, and no block without one of them, are read."""
    options = {"size": 8, "fraction": 1.0, "threads": 2, "corrupt": 0.01}
    whole = list(CropReader(report=print, **options).read(packed))  # type: ignore[arg-type]
    images = torch.cat([batch.images for batch in whole])
    ids = np.array([0, 3, 4, 50, 89])
    fetched = []
    fetch = BlockReader.fetch

    def count(self: BlockReader, shard: int, block: int) -> Block:
        fetched.append((shard, block))
        return fetch(self, shard, block)

    monkeypatch.setattr(BlockReader, "fetch", count)
    some = list(CropReader(report=print, **options).read(packed, ids=ids))  # type: ignore[arg-type]
    assert torch.cat([batch.ids for batch in some]).tolist() == ids.tolist()
    assert torch.equal(torch.cat([batch.images for batch in some]), images[ids])
    assert 3 <= len(fetched) <= 4
