"""The limits that the input pipeline is measured against are those of the pipeline's own work."""

from contextlib import closing

import torch

from launch.benchmarks import limits
from launch.benchmarks.input import _ours
from shards.index import Index
from shards.order import Order
from shards.views import ViewsConfig


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
