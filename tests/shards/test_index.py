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
    sidecar.write_text(f"[[0, {found.shards[2].samples}]]")
    with pytest.raises(InputError, match=r"shard-000002.tar.blocks.json: does not match"):
        found.blocks(2)
    for text in ('{"0": 1}', "[[0, true]]", "[[0, 1e400]]", "[[0]]", "[" * 10**5, "[[-1, 15]]"):
        sidecar.write_text(text)
        with pytest.raises(InputError, match=r"blocks.json: (is damaged|not valid JSON)"):
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


def test_blocks_have_numbers_in_file_order(packed: Index) -> None:
    counts = [len(packed.blocks(shard)) for shard in range(len(packed.shards))]
    every = [(shard, block) for shard, count in enumerate(counts) for block in range(count)]
    assert packed.block_counts.tolist() == counts
    assert packed.places(np.arange(len(every))) == every
    assert packed.places(np.array([5, 0, len(every) - 1])) == [every[5], every[0], every[-1]]
    assert packed.places(np.arange(0)) == []


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.train .*no index\.json there; pack images"):
        index.load(str(tmp_path), "data.train")


def test_a_folder_of_images_is_no_data_set_yet(tmp_path: Path) -> None:
    """The line has the command, and for data.val the field that takes such a folder."""
    for name in ("flat/1.JPG", "deep/train/cat/1.png", "deep/val/cat/2.png", "a b/cat/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def told(name: str, field: str) -> str:
        match = rf"^{field} .*/{name}: no index\.json there; it is a folder of images: "
        with pytest.raises(InputError, match=match) as error:
            index.load(f"{tmp_path}/{name}", field)
        return str(error.value)

    flat = f"{tmp_path}/flat"
    line = told("flat", "data.train")
    assert f"pack.py {flat} {flat}-packed` and give --data.train {flat}-packed" in line
    assert "probe" not in line
    assert told("flat", "data.val").endswith(
        f"or give --probe.val {flat}, which takes such a folder as it is"
    )
    assert told("deep", "data.train").endswith(f"give --data.train {tmp_path}/deep-packed/train")
    assert f"--data.train '{tmp_path}/a b-packed'" in told("a b", "data.train")


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


HUGE = 10**25


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"samples": 91}, "samples must be 90, as the shards say, not 91"),
        ({"samples": True}, "samples must be a whole number, not true or false"),
        ({"samples": HUGE}, "samples must be a number of 64 bits"),
        ({"classes": None}, "classes must be a list, not null"),
        ({"classes": ["a", 1, "b"]}, r"classes\[1\] must be a text, not a whole number \(1\)"),
        ({"plan": 1.5}, "plan must be a text, not a number"),
        ({"version": HUGE}, "index version a number of more than 64 bits, not 1"),
        ({"version": [1]}, "index version a list of 1, not 1"),
        ({"digest": None}, "digest must be a text"),
        ({"shards": {}}, "shards must be a list, not an object"),
        ({"shards": [3]}, r"shards\[0\] must be an object, not a whole number"),
        ({"name": "../x.tar"}, "which is no plain name of a file in its folder"),
        ({"name": 3}, r"shards\[1\].name must be a text"),
        ({"bytes": -1}, r"shards\[1\].bytes must be at least 0"),
        ({"bytes": 1e400}, r"shards\[1\].bytes must be a whole number, not a number \(inf\)"),
        ({"bytes": 2048}, r"shards\[1\].(samples must fit|blocks must begin)"),
        ({"checksum": "0" * 16}, r"shards\[1\].checksum is not that of its blocks"),
        ({"crcs": [1]}, r"shards\[1\].crcs must be one for each block"),
        ({"crcs": [2**32] * 4}, r"shards\[1\].crcs\[0\] must be at least 0 and less than"),
        ({"blocks": None}, r"shards\[1\].crcs must be absent where"),
        ({"blocks": [[512, 1], [0, 1]]}, r"shards\[1\].blocks must begin one after another"),
        ({"blocks": [[0, 1], [0, 1]]}, r"shards\[1\].blocks must begin one after another"),
        ({"blocks": [[0, 2**40]]}, r"shards\[1\].blocks must have from 1 to as many"),
        ({"blocks": [[0, 1], [512, -1]]}, r"shards\[1\].blocks\[1\]\[1\] must be at least 0"),
        ({"blocks": [[0, 1]]}, r"shards\[1\].blocks must hold the shard's"),
        ({"blocks": [[0, True]]}, r"blocks\[0\]\[1\] must be a whole number, not true or false"),
    ],
)
def test_every_field_is_checked(packed: Index, changes: dict[str, object], text: str) -> None:
    """Also where the digest was made to fit."""
    path = Path(packed.url) / index.NAME
    document = json.loads(path.read_text())
    for name, value in changes.items():
        (document if name in document else document["shards"][1])[name] = value
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=text) as caught:
        index.load(packed.url, "data.train")
    assert str(caught.value).startswith(f"data.train {packed.url}: index")
    assert len(str(caught.value)) < 500


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
