"""Training images from a real S3 server: few requests, faults mended, failures in one line."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import index as indexes
from shards.center_crops import CropReader
from shards.errors import InputError
from shards.index import Index
from shards.loader import Assignment, Batch, DataConfig, TrainLoader
from shards.order import Order
from shards.reader import BlockReader
from shards.storage import files, retries
from shards.views import ViewsConfig
from tests.conftest import Files, PackFiles
from tests.helpers import fault_proxy
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.object_store import lead_to
from tests.helpers.places import ROOT

SEED = 11
SHARD = r"^GET .*/shard-\d+\.tar"


@pytest.fixture
def remote(s3: str, pack_files: PackFiles, photos: Files) -> str:
    """URL of the photos in about five shards of about four blocks each."""
    pack_files(f"{s3}/photos", photos)
    return f"{s3}/photos"


@pytest.fixture
def proxy(remote: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The one that is harmless until it is told otherwise, made when the photos are there."""
    assert remote
    monkeypatch.setattr(fault_proxy, "DELAY", (0.0, 0.1))
    return proxy


def ignore(_: str) -> None:
    pass


@contextmanager
def loading(
    found: Index,
    streams: int = 3,
    batch: int = 15,
    report: Callable[[str], None] = ignore,
    **fields: Any,
) -> Iterator[TrainLoader]:
    order, config = Order(found, SEED, streams, batch), DataConfig(audit=True, **fields)
    loader = TrainLoader(
        Assignment(order, range(streams), ViewsConfig(size=16), config, threads=2), report
    )
    try:
        yield loader
    finally:
        loader.close()


def take(found: Index, steps: int, **options: Any) -> list[Batch]:
    with loading(found, **options) as loader:
        return [next(loader) for _ in range(steps)]


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        assert torch.equal(a.views, b.views)
        assert torch.equal(a.params, b.params)
        assert torch.equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.crcs, b.crcs)


# Requests


def test_a_data_set_is_one_get_and_one_for_each_block(proxy: FaultProxy, remote: str) -> None:
    found = indexes.load(remote, "data.train")
    reader = BlockReader(found)
    blocks = [(s, b) for s in range(len(found.shards)) for b in range(len(found.blocks(s)))]
    for shard, block in blocks:
        reader.fetch(shard, block)
    assert proxy.requests("^GET .*/photos/index.json") == 1
    assert [r.status for r in proxy.log] == [200] + [206] * len(blocks)
    assert {r.method for r in proxy.log} == {"GET"}
    assert not proxy.requests("list-type|delimiter|prefix=")
    size = sum(shard.bytes for shard in found.shards)
    begin = sum(int(found.blocks(s)[0, 0]) for s in range(len(found.shards)))
    assert proxy.bytes_sent(SHARD) == size - begin


def test_training_lists_nothing_and_fetches_little_twice(proxy: FaultProxy, remote: str) -> None:
    found = indexes.load(remote, "data.train")
    epochs, steps = 10, 90 // 15
    with loading(found, streams=1, prefetch=0) as loader:
        for _ in range(epochs * steps):
            next(loader)
        sent = proxy.bytes_sent(SHARD)
    assert {r.method for r in proxy.log} == {"GET"}
    assert proxy.requests() == proxy.requests(SHARD) + 1
    size = sum(shard.bytes for shard in found.shards)
    assert epochs * size * 0.95 < sent  # but for what lies before the first blocks
    assert sent <= 1.1 * epochs * size


def test_memory_bounds_what_is_fetched_ahead(proxy: FaultProxy, remote: str) -> None:
    """However many threads fetch, what nobody asked for yet is at most `block_memory`."""
    found = indexes.load(remote, "data.train")
    with loading(found, streams=3, prefetch=2) as loader:
        batch = next(loader)
        shards = sum(shard.bytes for shard in found.shards)
        assert len(batch.ids) == 15
        # Two batches and a few chunks more are on their way.
        assert proxy.bytes_sent(SHARD) <= loader.assignment.block_memory + shards * 5 * 15 / 90


def test_a_block_in_memory_serves_all_streams(
    proxy: FaultProxy,
    s3: str,
    pack_files: PackFiles,
    photos: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(indexes, "BLOCK_BYTES", 1 << 20)  # one block a shard
    found = pack_files(f"{s3}/few", photos)
    with loading(found, streams=15) as loader:
        next(loader)
        assert proxy.requests(SHARD) == len(found.shards) < 15


def test_evaluation_reads_every_byte_once(proxy: FaultProxy, remote: str) -> None:
    found = indexes.load(remote, "data.val")
    proxy.set({"slow_down": 0.1, "drop": 0.1}, only=SHARD)
    options: dict[str, Any] = {"size": 16, "fraction": 1, "threads": 2, "corrupt": 0}
    batches = list(CropReader(report=ignore, **options).read(found))
    assert sum(len(batch.labels) for batch in batches) == 90
    blocks = sum(len(found.blocks(s)) for s in range(len(found.shards)))
    faults = proxy.counts()["slow_down"] + proxy.counts()["drop"]
    assert proxy.requests(SHARD) == blocks + faults
    assert faults > 0


# Faults


def spoil_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong bytes begin where the body begins, in a header: in a picture nothing would notice."""
    flipped = fault_proxy._flipped

    def from_the_start(pieces: AsyncIterator[bytes], start: int, stop: int) -> Any:
        return flipped(pieces, 0, stop - start)

    monkeypatch.setattr(fault_proxy, "_flipped", from_the_start)


ALL = {"delay": 0.1, "slow_down": 0.1, "drop": 0.1, "truncate": 0.1, "wrong": 0.1}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("cached", [False, True])
def test_batches_through_faults_are_those_of_a_disk(
    proxy: FaultProxy,
    remote: str,
    packed: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: bool,
) -> None:
    monkeypatch.setattr(retries, "ATTEMPTS", 20)  # such faults are met by chance too
    monkeypatch.setattr(retries, "CONTENT_ATTEMPTS", 12)
    monkeypatch.setattr(retries, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(files, "PART", 10_000)  # so that copying a shard is many requests
    spoil_heads(monkeypatch)
    steps = 5 * (90 // 15)
    expected = take(packed, steps)
    found = indexes.load(remote, "data.train")
    assert found.digest == packed.digest
    proxy.set(ALL, only=SHARD)
    reports: list[str] = []
    half = sum(shard.bytes for shard in found.shards) / 2 / 1e9
    fields = {"cache": f"{tmp_path}/cache", "cache_gb": half} if cached else {}
    assert_equal(take(found, steps, report=reports.append, **fields), expected)
    assert all(proxy.counts().values())
    urls = [re.match(rf"{remote}/shard-\d+.tar", report) for report in reports]
    assert reports
    assert len({url[0] for url in urls if url}) == len(reports)  # once each
    assert all("not what was packed, its CRC32 differs" in report for report in reports)
    copies = list((tmp_path / "cache").rglob("*.tar"))
    assert len(copies) == (len(found.shards) // 2 if cached else 0)


def test_a_cached_shard_is_fetched_once(proxy: FaultProxy, remote: str, tmp_path: Path) -> None:
    found = indexes.load(remote, "data.train")
    steps = 3 * (90 // 15)
    for _ in range(2):  # a second run begins with what the first one kept
        take(found, steps, cache=f"{tmp_path}/cache", cache_gb=1)
    size = sum(shard.bytes for shard in found.shards)
    assert proxy.bytes_sent(SHARD) == size


def test_content_that_stays_wrong(
    proxy: FaultProxy, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_heads(monkeypatch)
    proxy.set({"wrong": 1}, only=SHARD)
    reports: list[str] = []
    reader = BlockReader(indexes.load(remote, "data.train"), report=reports.append)
    for _ in range(2):
        with pytest.raises(InputError, match=r"shard-000001\.tar: bytes \d+ to \d+: not the tar"):
            reader.fetch(1, 1)
    assert proxy.requests(SHARD) == 2 * retries.CONTENT_ATTEMPTS
    (report,) = reports
    assert report.endswith("; fetched again")


def test_wrong_content_on_a_disk_is_read_once(
    packed: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(packed.shard_url(1))
    content = bytearray(path.read_bytes())
    content[int(packed.blocks(1)[1, 0])] ^= 1
    path.write_bytes(content)
    reads: list[int] = []
    read = files.read

    def counted(url: str, start: int | None = None, stop: int | None = None) -> bytes:
        reads.append(start or 0)
        return read(url, start, stop)

    monkeypatch.setattr(files, "read", counted)
    with pytest.raises(InputError, match="not the tar"):
        BlockReader(packed, report=lambda _: None).fetch(1, 1)
    assert len(reads) == 1


# Failures


def drain(loader: TrainLoader) -> None:
    for _ in range(30):
        next(loader)


def failure(remote: str) -> str:
    """The line that a training from `remote` ends with."""
    with pytest.raises((InputError, OSError)) as caught:
        take(indexes.load(remote, "data.train"), 30)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_missing_buckets_and_data_sets(proxy: FaultProxy, remote: str) -> None:
    assert failure("s3://no-such-bucket/photos").startswith(
        "data.train s3://no-such-bucket/photos: s3://no-such-bucket/photos/index.json: "
    )
    assert "create the bucket, or correct the URL" in failure("s3://no-such-bucket/photos")
    assert failure(f"{remote}2").startswith(f"data.train {remote}2: no index.json there; pack")
    assert proxy.requests("no-such-bucket") == 2
    assert len(proxy.log) < 15  # A hint takes a few more.


def test_wrong_credentials(proxy: FaultProxy, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    lead_to(proxy.endpoint, monkeypatch)
    text = failure(remote)
    assert text.startswith(f"data.train {remote}: {remote}/index.json: access denied: ")
    assert "(InvalidAccessKeyId): the credentials are not accepted" in text
    assert len(proxy.log) == 1


def test_a_dead_endpoint(proxy: FaultProxy, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = indexes.load(remote, "data.train")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        lead_to(f"http://127.0.0.1:{unused.getsockname()[1]}", monkeypatch)
    told = f"gave up after {retries.ATTEMPTS} tries"
    assert failure(remote).startswith(f"data.train {remote}: {remote}/index.json: {told}")
    with pytest.raises(InputError, match=rf"shard-\d+\.tar: {told} .*is AWS_ENDPOINT_URL right"):
        take(found, 1)
    assert proxy.requests() == 1


def test_a_store_that_dies_meanwhile(proxy: FaultProxy, remote: str) -> None:
    with loading(indexes.load(remote, "data.train")) as loader:
        next(loader)
        proxy.set({"slow_down": 1})
        told = f"gave up after {retries.ATTEMPTS} tries"
        with pytest.raises(InputError, match=rf"shard-\d+\.tar: {told} .*SlowDown"):
            drain(loader)


@pytest.mark.usefixtures("proxy")
def test_a_shard_deleted_meanwhile(remote: str) -> None:
    with loading(indexes.load(remote, "data.train")) as loader:
        next(loader)
        files.remove(f"{remote}/shard-000002.tar")
        with pytest.raises(InputError) as caught:
            drain(loader)
    assert str(caught.value) == f"{remote}/shard-000002.tar: the shard is missing: restore it"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.usefixtures("proxy")
def test_a_truncated_shard(remote: str, tmp_path: Path, cached: bool) -> None:
    found = indexes.load(remote, "data.train")
    url = f"{remote}/shard-000002.tar"
    files.write(url, files.read(url)[:20_000])
    fields = {"cache": f"{tmp_path}/cache"} if cached else {}
    with pytest.raises(InputError, match=rf"^{url}: gave up after 4 tries.*truncated, restore it$"):
        take(found, 30, **fields)


# The command

TRAIN = """
import json, os, runpy, sys
forks = []
def watch(event, arguments):
    if event in ("os.fork", "os.forkpty"):
        import fsspec.asyn
        forks.append(fsspec.asyn.iothread[0] is not None)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
exit_at_once = os._exit
os._exit = sys.exit
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    status = stop.code or 0
else:
    status = 0
import fsspec.asyn
if os.fork() == 0:
    exit_at_once(0)
os.wait()
used = fsspec.asyn.iothread[0] is not None
print(json.dumps({"status": status, "used": used, "forks": forks}))
"""


def test_training_forks_nothing_once_the_store_was_used(s3: str) -> None:
    """s3fs does not survive a fork. The fork at the end shows that they are seen."""
    data = ("--data.train", f"{s3}/train", "--data.val", f"{s3}/val", "--data.draw", "64")
    run = ("--run-url", f"{s3}/run", "--steps", "2", "--batch.size", "16", "--probe.every", "2")
    script = (str(ROOT / "launch" / "train.py"), str(ROOT / "recipes" / "quickstart.py"))
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *script, *data, *run, "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"status": 0, "used": True, "forks": [True]}, done.stderr
    assert files.exists(f"{s3}/run/metrics.jsonl")
