"""The checkpoint's files, against torch's own writer and reader."""

import random
import zlib
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from engine.processes import world
from engine.state import dcp_files
from engine.state.dcp_files import Reader, Sums, Writer, verify_file
from engine.state.dcp_metadata import Place
from shards.errors import InputError
from shards.storage import files
from tests.helpers.dcp_state import (
    FILE,
    State,
    blank,
    load,
    plain_files,
    plain_state,
    save,
    stock,
    sums,
)
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.ranks import Ranks

pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@pytest.fixture(params=["disk", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL below which nothing is, on each kind of store."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/checkpoint"
    return f"memory://{tmp_path.name}" if request.param == "memory" else f"{tmp_path}/not/there"


def test_round_trip(folder: str) -> None:
    written = save(folder, plain_state())
    assert written == sums(plain_files(folder))
    assert written.keys() == {FILE, ".metadata"}
    found = load(folder, written, plain_state())
    torch.testing.assert_close(found, plain_state(), rtol=0, atol=0)


def test_a_folder_that_was_used_before(folder: str) -> None:
    save(folder, plain_state(1))
    written = save(folder, plain_state(2))
    found = load(folder, written, plain_state())
    torch.testing.assert_close(found, plain_state(2), rtol=0, atol=0)


def test_torch_reads_what_was_written(folder: str) -> None:
    save(folder, plain_state())
    found = blank(plain_state())
    dcp_load(found, storage_reader=stock.FsspecReader(folder), no_dist=True)
    torch.testing.assert_close(found, plain_state(), rtol=0, atol=0)


def test_what_torch_wrote_is_read(folder: str) -> None:
    """In two files, as torch writes with two threads."""
    writer = stock.FsspecWriter(folder, sync_files=False, thread_count=2)
    dcp_save(plain_state(), storage_writer=writer, no_dist=True)
    contents = plain_files(folder)
    assert len(contents) == 3
    found = load(folder, sums(contents), plain_state())
    torch.testing.assert_close(found, plain_state(), rtol=0, atol=0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read from storage gave."""
    lengths: list[int] = []
    read = files.read

    def counted(*arguments: Any) -> bytes:
        content = read(*arguments)
        if "/lease/" not in arguments[0]:  # which a run of another test may still look at
            lengths.append(len(content))
        return content

    monkeypatch.setattr(files, "read", counted)
    return lengths


@pytest.mark.parametrize("span", [1000, 20_000])
def test_tensors_larger_and_smaller_than_a_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[int], span: int
) -> None:
    state = plain_state()
    del state["empty"]  # which is not read
    written = save(str(tmp_path), state)
    monkeypatch.setattr(dcp_files, "SPAN", span)
    torch.testing.assert_close(load(str(tmp_path), written, state), state, rtol=0, atol=0)
    metadata, *spans = reads
    assert metadata == written[".metadata"][0]
    assert max(spans) <= span
    assert sum(spans) == written[FILE][0]


def test_neighbours_are_read_together(tmp_path: Path, reads: list[int]) -> None:
    load(str(tmp_path), save(str(tmp_path), plain_state()), plain_state())
    assert len(reads) == 2


def test_only_what_is_wanted_is_read(tmp_path: Path, reads: list[int]) -> None:
    large = {f"large{i}": torch.randn(1 << 20) for i in range(3)}
    written = save(str(tmp_path), large)
    load(str(tmp_path), written, {"large1": large["large1"]})
    assert sum(reads) < 5 << 20


def sharded(value: Tensor) -> State:
    """Rows shared out over the processes of the default group."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"rows": distribute_tensor(value, mesh, [Shard(0)]), "whole": value.clone()}


def save_sharded(url: str, value: Tensor) -> Sums:
    world.join(1, distributed=True)
    writer = Writer(url)
    dcp_save(sharded(value), storage_writer=writer)
    return writer.sums


def load_sharded(url: str, written: Sums, value: Tensor) -> bool:
    world.join(1, distributed=True)
    state = sharded(torch.zeros_like(value))
    dcp_load(state, storage_reader=Reader(url, written))
    return torch.equal(state["rows"].full_tensor(), value) and torch.equal(state["whole"], value)


def test_shards_of_other_numbers_of_processes(tmp_path: Path, ranks: Ranks) -> None:
    """Written by 3, with a file from each; read by 2, and by one as a plain tensor."""
    value, url = torch.randn(7, 5), str(tmp_path)
    parts = ranks.run(save_sharded, url, value, size=3)
    assert [set(part) for part in parts] == [
        {FILE, ".metadata"},
        {"__1_0.distcp"},
        {"__2_0.distcp"},
    ]
    written = {name: entry for part in parts for name, entry in part.items()}
    assert written == sums(plain_files(url))
    assert ranks.run(load_sharded, url, written, value, size=2) == [True, True]
    found = load(url, written, {"rows": value, "whole": value})
    torch.testing.assert_close(found, {"rows": value, "whole": value}, rtol=0, atol=0)


def test_metadata_does_not_tell_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "store", {})
    url = f"memory://name:secret@{tmp_path.name}?token=secret"
    writer = Writer(url)
    assert writer.checkpoint_id == f"memory://{tmp_path.name}"
    save(url, plain_state())
    contents = plain_files(url)
    assert b"secret" not in contents[".metadata"]


def test_requests(s3: str, proxy: FaultProxy) -> None:
    """Two objects are written by two requests; nothing is renamed, which S3 does by copying."""
    written = save(f"{s3}/a", plain_state())
    assert [(r.method, r.path) for r in proxy.log] == [
        ("PUT", f"/{s3.removeprefix('s3://')}/a/{name}") for name in (FILE, ".metadata")
    ]
    del proxy.log[:]
    load(f"{s3}/a", written, plain_state())
    assert [request.method for request in proxy.log] == ["GET", "GET"]


def test_damage_on_the_way_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file comes damaged the first time that something is read from it."""
    written = save(str(tmp_path), plain_state())
    read = files.read
    seen: set[str] = set()

    def flipped(url: str, *range_: int) -> bytes:
        content = bytearray(read(url, *range_))
        if url not in seen and url.startswith(str(tmp_path)):  # not another test's thread
            seen.add(url)
            content[::50] = bytes(byte ^ 1 for byte in content[::50])
        return bytes(content)

    monkeypatch.setattr(files, "read", flipped)
    for name, entry in written.items():
        verify_file(f"{tmp_path}/{name}", *entry)
    assert len(seen) == len(written)
    seen.clear()
    torch.testing.assert_close(load(str(tmp_path), written, plain_state()), plain_state())
    assert len(seen) == len(written)


def test_a_flipped_bit_on_the_way_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a number: torch would load it."""
    state = {"tensor": torch.arange(1000.0)}
    written = save(str(tmp_path), state)
    read = files.read
    flips: list[int] = []

    def flipped(url: str, *range_: int) -> bytes:
        content = bytearray(read(url, *range_))
        at = content.find(state["tensor"].numpy().tobytes())
        if at >= 0 and not flips:
            content[at + 2000] ^= 1
            flips.append(at)
        return bytes(content)

    monkeypatch.setattr(files, "read", flipped)
    torch.testing.assert_close(load(str(tmp_path), written, state), state, rtol=0, atol=0)
    assert len(flips) == 1


def test_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read is whole in its span, which is large only if a single one is."""
    monkeypatch.setattr(dcp_files, "SPAN", 300)
    monkeypatch.setattr(dcp_files, "GAP", 20)
    chance = random.Random(0)
    for _ in range(200):
        places = [
            Place(chance.choice("ab"), chance.randrange(2000), chance.choice((1, 40, 200, 700)))
            for _ in range(chance.randrange(40))
        ]
        reads: list[Any] = [(place, number) for number, place in enumerate(places)]
        spans = dcp_files._spans(reads)
        assert sorted(item for span in spans for item in span.reads) == sorted(reads)
        for span in spans:
            for place, _number in span.reads:
                assert place.file == span.file
                assert span.start <= place.offset < place.offset + place.length <= span.stop
            single = max(place.length for place, _number in span.reads)
            assert span.stop - span.start <= max(300, single)


def test_verify(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_files, "SPAN", 1000)
    content = bytes(range(256)) * 20
    crc = zlib.crc32(content)
    files.write(f"{folder}/file", content)
    verify_file(f"{folder}/file", len(content), crc)
    files.write(f"{folder}/empty", b"")
    verify_file(f"{folder}/empty", 0, 0)
    with pytest.raises(InputError, match=f"^{folder}: other is missing$"):
        verify_file(f"{folder}/other", len(content), crc)
    damaged = f"^{folder}: file is damaged, its length or CRC32 differs$"
    for changed in (content[:-1], content + b"0", content[:2000] + b"0" + content[2001:]):
        files.write(f"{folder}/file", changed)
        with pytest.raises(InputError, match=damaged):
            verify_file(f"{folder}/file", len(content), crc)


def test_a_store_that_does_not_answer_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = save(str(tmp_path), plain_state())

    def fail(*_: object) -> bytes:
        raise OSError("gave up")

    monkeypatch.setattr(files, "read", fail)
    with pytest.raises(OSError, match="gave up"):
        verify_file(f"{tmp_path}/{FILE}", *written[FILE])
    with pytest.raises(CheckpointException, match="gave up") as caught:
        load(str(tmp_path), written, plain_state())
    assert isinstance(caught.value.failures[0][0], OSError)
