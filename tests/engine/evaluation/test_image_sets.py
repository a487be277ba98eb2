"""Images are decoded in threads and come in order, each with its pixels or its fault."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.evaluation.image_sets import FolderImages, Sample, ShardImages, load
from shards.decode import DEFAULT_RULES, DecodeError
from shards.index import Index, Shard
from shards.making.convert import PixelOptions
from shards.making.image_folders import find_all_images
from tests.conftest import draw_photo

BAD = 13


def samples(count: int, taken: list[str]) -> Iterator[Sample]:
    for number in range(count):

        def decode(number: int = number) -> Tensor:
            taken.append(threading.current_thread().name)
            if number == BAD:
                raise DecodeError("bad")
            return torch.tensor(number)

        yield Sample(number, str(number), 0, decode)


@pytest.mark.parametrize("together", [1, 16])
@pytest.mark.parametrize("threads", [1, 3])
def test_all_come_in_order(threads: int, together: int) -> None:
    taken: list[str] = []
    found = list(load(samples(101, taken), lambda pixels: pixels + 1, threads, together))
    assert [sample.id for sample, _ in found] == list(range(101))
    faults = [number for number, (_, item) in enumerate(found) if isinstance(item, DecodeError)]
    assert faults == [BAD]
    values = [int(item) for _, item in found if isinstance(item, Tensor)]
    assert values == [number + 1 for number in range(101) if number != BAD]
    assert len(set(taken)) <= threads
    assert len(taken) == 101


def test_no_more_is_read_than_threads_need() -> None:
    read = iter(samples(10_000, []))
    found = load(read, lambda pixels: pixels, 2, 16)
    next(found)
    assert next(read).id <= 16 * (2 * 2 + 1)


def test_small_images_of_shards_have_one_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    def count(size: int) -> int:
        index = Index("none", [Shard("a.tar", 100, 100 * size, None, "")])
        return ShardImages(index, DEFAULT_RULES, print).count_threads(16, 32**2)

    assert (count(2_568), count(10_000), count(130_000)) == (1, 2, 16)
    folder = tmp_path_factory.mktemp("images")
    (folder / "a.jpg").write_bytes(draw_photo(0, 8, 8))
    found = find_all_images(str(folder), "DATA", follow_links=False, follower="")
    options = PixelOptions(10**9)
    assert FolderImages(str(folder), found, options, DEFAULT_RULES).count_threads(16, 32**2) == 16
    remote = FolderImages("s3://bucket/images", found, options, DEFAULT_RULES)
    assert remote.count_threads(16, 32**2) == 32
    assert remote.count_threads(64, 32**2) == 64
