"""Many threads decode photos at once, and a single one decodes small images."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shards import device_crops
from shards.center_crops import CropReader
from shards.decode_threads import count_processes, count_useful
from shards.index import Index, Shard
from shards.loader import Assignment, DataConfig, TrainLoader
from shards.order import Order
from shards.views import ViewsConfig
from tests.conftest import PackFiles, draw_photo

THREADS = 16
CPU = DataConfig()
IMAGE = torch.zeros(3, 32, 32, dtype=torch.uint8)
SMALL, LARGE = 0, 200_000  # bytes that stand behind the picture in the file


class Meeting:
    """Counts the threads that work at once. Up to `THREADS` of them wait for each other."""

    def __init__(self, wait: float) -> None:
        self.most, self.names, self._wait = 0, set[str](), wait
        self._inside, self._full = 0, threading.Condition()

    def during(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def working(*args: Any) -> Any:
            with self._full:
                self.names.add(threading.current_thread().name)
                self._inside += 1
                self.most = max(self.most, self._inside)
                self._full.notify_all()
                self._full.wait_for(lambda: self.most == THREADS, self._wait)
            try:
                return work(*args)
            finally:
                with self._full:
                    self._inside -= 1

        return working


def pack(pack_files: PackFiles, folder: Path, more: int) -> Index:
    content = draw_photo(0, 32, 32) + bytes(more)
    return pack_files(str(folder), {f"a/{i}.jpg": content for i in range(64)})


def train(index: Index, config: DataConfig = CPU) -> None:
    loader = TrainLoader(
        Assignment(Order(index, 0, 4, 64), range(4), ViewsConfig(size=32), config, THREADS),
        print,
        device=torch.device("cpu"),
    )
    for _ in range(5):
        next(loader)
    loader.close()


def evaluate(index: Index) -> None:
    batches = list(CropReader(32, 0.875, THREADS, 0.01, print).read(index))
    assert sum(len(batch.ids) for batch in batches) == 64


@pytest.mark.parametrize(
    ("read", "method"), [(train, (TrainLoader, "_decode")), (evaluate, (CropReader, "_load"))]
)
@pytest.mark.parametrize(("more", "expected"), [(SMALL, 1), (LARGE, THREADS)])
def test_small_images_are_decoded_one_chunk_at_a_time(
    read: Callable[[Index], None],
    method: tuple[type, str],
    more: int,
    expected: int,
    pack_files: PackFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = pack(pack_files, tmp_path, more)
    meeting = Meeting(wait=0.02 if expected == 1 else 20)
    monkeypatch.setattr(*method, meeting.during(getattr(*method)))
    monkeypatch.setattr("shards.center_crops.CHUNK", 2)
    read(found)
    assert meeting.most == expected
    assert len(meeting.names) == expected
    assert threading.current_thread().name not in meeting.names  # the training goes on meanwhile


def index_of(size: int) -> Index:
    """An index of a thousand samples of `size` bytes."""
    return Index("none", [Shard("a.tar", 1000, 1000 * size, None, "")])


@pytest.mark.parametrize(
    ("size", "pixels", "useful"),
    [
        (1_536, 2 * 8**2, 0),
        (2_568, 2 * 32**2, 0),  # CIFAR-10
        (4_000, 64**2, 0),
        (2_568, 2 * 224**2, 4),  # small images that are enlarged
        (10_000, 2 * 128**2, 3),
        (112_000, 2 * 224**2, 16),  # ImageNet
        (112_000, 224**2, 16),
    ],
)
def test_the_size_of_images_decides(size: int, pixels: int, useful: int) -> None:
    assert count_useful(16, index_of(size), pixels) == useful
    for threads in (1, 2, 3):
        assert count_useful(threads, index_of(size), pixels) == min(threads, useful)


@pytest.mark.parametrize(
    ("size", "threads", "streams", "processes"),
    [
        (2_568, 16, 32, 2),  # CIFAR-10
        (2_568, 1, 32, 1),
        (2_568, 16, 1, 1),
        (112_000, 16, 64, 1),  # ImageNet, whose threads are many
    ],
)
def test_several_processes_load_small_images(
    size: int, threads: int, streams: int, processes: int
) -> None:
    pixels = 2 * (32**2 if size < 10_000 else 224**2)
    assert count_processes(threads, index_of(size), pixels, streams) == processes


def test_an_empty_index_takes_no_thread() -> None:
    assert count_useful(16, Index("none", []), 0) == 0


def test_four_threads_decode_on_a_gpu(
    pack_files: PackFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them hinder each other."""
    meeting = Meeting(wait=0.5)
    monkeypatch.setattr(TrainLoader, "_decode", meeting.during(TrainLoader._decode))
    monkeypatch.setattr(device_crops, "decode_on_device", lambda some, _: [IMAGE for _ in some])
    train(pack(pack_files, tmp_path, LARGE), DataConfig(decode="gpu"))
    assert meeting.most == device_crops.THREADS
