"""Measure what bounds the input pipeline: decoding and cropping alone, and Python's lock."""

import io
import math
from collections.abc import Iterator
from functools import cache
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from launch.benchmarks.measuring import Cost, measure
from shards.decode import Box, DecodeError, crop_into, decode, decode_together
from shards.index import Index
from shards.loader import BATCHES_AHEAD, CHUNK
from shards.making import pack
from shards.order import Order
from shards.reader import BlockReader
from shards.views import ViewsConfig, crop_box, draw_views

THREADS = 1, 2, 4, 16  # decode threads of the process, one after the other
TINY = 8  # side of images in pixels whose decoding and cropping cost next to nothing
TINY_IMAGES = 1000


Work = list[tuple[bytearray, list[Box]]]  # encoded images, each with the boxes of its views


def list_work(order: Order, views: ViewsConfig, steps: int) -> Work:
    """Read the images of the first `steps` batches, one epoch at most, and draw their crops.

    Images that cannot be decoded are left out.
    """
    reader = BlockReader(order.index)
    work: Work = []
    fetch = cache(reader.fetch)
    for step in range(min(steps, order.steps_per_epoch)):
        for stream in range(order.streams):
            for segment in order.batch_segments(step, stream):
                block = fetch(segment.shard, segment.block)
                crops = draw_views(order.seed, 0, segment.ids, views).crop
                for i, position in enumerate(segment.rows.tolist()):
                    start, size = block.samples[position].image or (0, 0)
                    try:
                        _, height, width = reader.decode(block, position).shape
                    except DecodeError:
                        continue
                    boxes = [crop_box(uniforms, height, width, views) for uniforms in crops[:, i]]
                    work.append((block.content[start : start + size], boxes))
    return work


def measure_limit(work: Work, size: int) -> Cost:
    """Measure the cost of an image that one thread only decodes and crops.

    It takes the functions of the pipeline, in the same mode of torch. Each crop replaces the one
    before it, so that it stays in the processor's cache, while a pipeline has to write whole
    batches.
    """
    row = torch.empty(1, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    return measure(lambda: _decode_and_crop(work, row), len(work))


@torch.inference_mode()
def _decode_and_crop(work: Work, row: Tensor) -> None:
    images = ((decode(content, 0, len(content)), boxes) for content, boxes in work)
    for group in decode_together(images):
        for image, boxes in group:
            for box in boxes:
                crop_into(row, image, box)


def batches_to_fill(threads: int, batch: int) -> int:
    """Return how many batches a loader has begun, at most, before its first one is taken."""
    return BATCHES_AHEAD + math.ceil(2 * threads * CHUNK / batch) + 1


def batches_to_smooth(threads: int, batch: int) -> int:
    """Return how many batches are enough that it does not matter when the first one is taken.

    Where threads share a core, they end their chunks at about the same time, and several batches
    are then ready at once. So many chunks are ended four times.
    """
    return math.ceil(4 * threads * CHUNK / batch)


def draw_tiny(url: str, count: int) -> Index:
    """Pack `count` JPEGs of TINY pixels into a folder."""
    contents = {f"{i}.jpg": content for i, content in enumerate(_tiny_jpegs(count))}
    entries = [pack.Image(path, len(content), -1) for path, content in contents.items()]
    plan = pack.plan_shards(pack.ImageSet("", entries, []), 16_000_000, seed=0)
    index, _ = pack.write_shards(plan, url, lambda image: contents[image.path], threads=1)
    return index


def _tiny_jpegs(count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (TINY, TINY, 3), np.uint8)).save(buffer, "JPEG")
        yield buffer.getvalue()


def python_seconds(tiny: list[Cost]) -> float:
    """Return how long an image holds Python's lock, at most.

    The lock lets one thread at a time run Python. Where images have next to no pixels, the CPU time
    of one thread is that of Python and of calls, so an image holds the lock no longer. One process
    with any number of threads may reach one image in that time.

    Args:
        tiny: The costs of the images of `draw_tiny`, in views of TINY pixels.
    """
    return median(cost.cpu for cost in tiny)
