"""index.json: what it says is checked before it is used."""

import json
from pathlib import Path

import numpy as np
import pytest

from shards import index
from shards.errors import InputError
from shards.index import Index
from shards.storage import files


def edit(packed: Index, change: str, value: object) -> None:
    path = Path(packed.url) / index.NAME
    document = json.loads(path.read_text())
    document[change] = value
    path.write_text(json.dumps(document))


def test_round_trip(packed: Index) -> None:
    found = index.load(packed.url, "data.train")
    assert found.digest == packed.digest
    assert found.classes == ["ant", "bee", "cat"]
    assert found.samples == 90
    for i in range(len(found.shards)):
        np.testing.assert_array_equal(found.blocks(i), packed.blocks(i))


def test_blocks_tile_the_shards(packed: Index) -> None:
    first = 0
    for i, shard in enumerate(packed.shards):
        assert len(packed.blocks(i)) >= 3
        stop = 0
        for block, samples in enumerate(packed.blocks(i)[:, 1].tolist()):
            assert packed.first_id(i, block) == first
            start, old = packed.block_range(i, block)[0], stop
            assert start == old
            stop = packed.block_range(i, block)[1]
            first += samples
        assert stop == shard.bytes
    assert first == packed.samples


def test_sidecars(packed: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "INLINE_BLOCKS", 3)
    packed.save()
    found = index.load(packed.url, "data.train")
    assert all(shard.blocks is None for shard in found.shards)
    assert found.digest == packed.digest
    np.testing.assert_array_equal(found.blocks(1), packed.blocks(1))

    sidecar = Path(packed.url) / index.sidecar(found.shards[2].name)
    sidecar.write_text("[[0, 1]]")
    with pytest.raises(InputError, match=r"shard-000002.tar.blocks.json: does not match"):
        found.blocks(2)
    sidecar.unlink()
    with pytest.raises(InputError, match=r"shard-000002.tar.blocks.json: missing.*--index-only"):
        found.blocks(2)


def test_few_sidecars_are_kept(packed: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "INLINE_BLOCKS", 3)
    monkeypatch.setattr(index, "KEPT_SIDECARS", 2)
    packed.save()
    found = index.load(packed.url, "data.train")
    lists = [found.blocks(i) for i in range(3)]
    for shard in found.shards:
        (Path(packed.url) / index.sidecar(shard.name)).unlink()
    assert found.blocks(1) is lists[1]
    assert found.blocks(2) is lists[2]
    with pytest.raises(InputError, match="missing"):
        found.blocks(0)


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.train .*no index\.json there; pack images"):
        index.load(str(tmp_path), "data.train")


@pytest.mark.parametrize(
    ("change", "value", "text"),
    [
        ("version", 2, "index version 2, not 1"),
        ("digest", "0" * 16, "does not match its own digest"),
        ("classes", ["ant"], "does not match its own digest"),
        ("shards", [{"name": "shard-000000.tar"}], "is damaged"),
        ("shards", 3, "is damaged"),
        ("shards", [], "does not match its own digest"),
    ],
)
def test_damaged_index(packed: Index, change: str, value: object, text: str) -> None:
    edit(packed, change, value)
    with pytest.raises(InputError, match=text):
        index.load(packed.url, "data.train")


def test_no_json_and_no_object(packed: Index) -> None:
    path = Path(packed.url) / index.NAME
    path.write_text(path.read_text()[:-5])
    with pytest.raises(InputError, match=r"index\.json: not valid JSON"):
        index.load(packed.url, "data.train")
    path.write_text("[]")
    with pytest.raises(InputError, match="is damaged"):
        index.load(packed.url, "data.train")


def test_empty_data_set(tmp_path: Path) -> None:
    Index(str(tmp_path), []).save()
    with pytest.raises(InputError, match="the data set is empty"):
        index.load(str(tmp_path), "data.train")


def test_shard_sizes_are_checked_on_a_disk(packed: Index) -> None:
    path = Path(packed.shard_url(1))
    content = path.read_bytes()
    path.write_bytes(content[:-700])
    with pytest.raises(InputError, match=r"shard-000001\.tar is truncated: \d+ bytes, index"):
        index.load(packed.url, "data.train")
    path.write_bytes(content + b"0")
    with pytest.raises(InputError, match=r"shard-000001\.tar is changed"):
        index.load(packed.url, "data.train")
    path.unlink()
    with pytest.raises(InputError, match=r"shard-000001\.tar is missing"):
        index.load(packed.url, "data.train")


def test_digest_covers_what_decides_the_samples(packed: Index) -> None:
    other = Index(packed.url, packed.shards[::-1], packed.classes)
    assert other.digest != packed.digest
    assert Index("s3://elsewhere", packed.shards, packed.classes).digest == packed.digest


def test_urls_are_redacted_in_messages() -> None:
    with pytest.raises(InputError) as caught:
        index.load("memory://user:secret@nowhere/data", "data.val")
    assert "secret" not in str(caught.value)
    assert files.redact("s3://key:secret@b/p?X-Sig=1") == "s3://b/p"
