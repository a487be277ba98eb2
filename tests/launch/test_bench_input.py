"""The input bench runs, and its limits are those of the pipeline's own work."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from launch.benchmarks import limits
from launch.benchmarks.input import _ours
from shards.index import Index
from shards.making import synthetic
from shards.order import Order
from shards.views import ViewsConfig
from tests.helpers.benches import rows, run


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _few_tiny_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.benchmarks.limits.THREADS", (1, 2))
    monkeypatch.setattr("launch.benchmarks.limits.TINY_IMAGES", 20)


def test_the_limit_is_that_of_the_same_crops(packed: Index) -> None:
    order, views = Order(packed, 0, 4, 16), ViewsConfig(size=24)
    work = limits.list_work(order, views, 2)
    assert len(work) == 32
    out = torch.empty(1, 3, 24, 24, dtype=torch.uint8, memory_format=torch.channels_last)
    with closing(_ours(order, views, threads=1)) as loader:
        images = next(loader).views[0]
    for image, (content, boxes) in zip(images, work, strict=False):
        limits._decode_and_crop([(content, boxes[:1])], out)
        assert torch.equal(out[0], image)


def test_input_on_drawn_photos(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.benchmarks.input.PHOTOS", 12)
    options = "--size 32 --images 10 --batch 5 --rounds 2 --threads 1"
    lines = run(f"input {options}", capsys)
    assert rows(lines, "host work with a GPU") == 2
    assert rows(lines, "all on the CPU") == 2 * (not torch.cuda.is_available())
    assert rows(lines, "ours / limit") == 1
    assert rows(lines, "Python of an image, at most") == 1
    assert rows(lines, "ours with 1 threads") == rows(lines, "ours with 2 threads") == 2


def test_input_from_a_bucket(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.index.BLOCK_BYTES", 8192)
    synthetic.write("memory://bench/data", 64, 32, seed=0)
    options = "--size 32 --images 16 --batch 8 --rounds 1 --threads 1"
    lines = run(f"input --data memory://bench/data {options}", capsys)
    assert rows(lines, "object store") == 2
    (share,) = [line for line in lines if line.startswith("bytes fetched")]
    assert 0.8 < float(share.split()[-2]) < 1.5


def test_input_on_tars_without_an_index(
    packed: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in packed.shards:
        shutil.copy(f"{packed.url}/{shard.name}", folder)
    before = sorted(folder.iterdir())
    options = "--size 16 --images 10 --batch 10 --rounds 1 --threads 1"
    for data in (before[0], folder, Path(packed.url)):
        assert rows(run(f"input --data {data} {options}", capsys), "host work") == 2
    assert sorted(folder.iterdir()) == before  # nothing is written next to the user's data
