"""Measure this project's input pipeline beside DataLoader, PIL and torchvision."""

import io
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache, partial
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from engine.method.augment import MEAN, STD, augment
from engine.processes import world
from launch.benchmarks import limits, remote
from launch.benchmarks.measuring import (
    CORES,
    CUDA,
    Cost,
    alternate,
    measure,
    repeat,
    require_positive,
)
from launch.benchmarks.results import Report, Row, check_out, ratio, speeds
from shards import index as indexes
from shards.errors import InputError
from shards.index import Index
from shards.loader import Assignment, DataConfig, TrainLoader
from shards.making import pack, scan
from shards.making.tars import find_tars
from shards.order import Order, rank_streams
from shards.reader import BlockReader
from shards.samples import Layout
from shards.storage import files
from shards.views import ViewConfig, ViewsConfig

PHOTOS = 200  # images drawn when no data is given


def bench_input(
    *,
    data: str = "",
    size: int = 224,
    images: int = 500,
    batch: int = 50,
    rounds: int = 3,
    threads: int = CORES,
    out: str = "",
) -> Report:
    """Measure this project's input pipeline beside DataLoader, PIL and torchvision.

    Ours and stock, the usual way, turn images into two views. Ours cuts and resizes the two crops
    in threads and leaves colors and blur to the device. Stock does everything in worker processes,
    one image at a time. So there are two comparisons: the host's work when a GPU does the rest and,
    without a GPU, all of the work on the host.

    Both sides get the same images in the same order. Stock finds their bytes in memory, while ours
    reads its shards.

    Shards in an object store are also compared with a copy of them on a local disk. The bytes
    fetched for an image are compared with the bytes that it has in the data set.

    The limit of a core is what one thread reaches that only decodes and crops the same images. The
    limit of a process is the time that an image keeps other threads from Python. It is measured on
    images of 8 pixels, which leave nothing else to do. Both are tried with 1, 2, 4 and 16 threads.

    Args:
        data: URL of a folder of shards, or a local tar or folder of tars, which is indexed in a
            temporary folder. By default photos are drawn, 500x375 and about 100 KB each.
        size: Side of a view in pixels.
        images: Minimum number of images measured in a round.
        batch: Images in a batch.
        rounds: Number of times that each side is measured.
        threads: Decode threads for ours, and worker processes for stock.
        out: File that the rows are also written to, as JSON.
    """
    check_out(out)
    files.check(data, "--data")
    require_positive(size=size, images=images, batch=batch, rounds=rounds, threads=threads)
    device = world.join(threads, distributed=False).device
    # A stock worker makes whole batches, so each worker has to make the same number of them.
    warm, count = 2 * threads, threads * math.ceil(images / batch / threads)
    views = ViewsConfig(size=size)
    with TemporaryDirectory() as folder:
        order = Order(_find_index(data, folder, batch), 0, math.gcd(batch, 10), batch)
        contents = read_contents(order, warm + count)
        sample, params = _device_batch(order, views, device)
        distort: Callable[..., Tensor] = partial(augment, blur=views.ever_blur)
        if CUDA:
            distort = torch.compile(distort)
        distort(sample, params)

        def ours(order: Order = order) -> Cost:
            with closing(_ours(order, views, threads)) as batches:
                return _steady(batches, warm, count, batch)

        def augmentation() -> Cost:
            calls = max(1, count // 2)
            return measure(lambda: repeat(lambda: distort(sample, params), calls), calls * batch)

        def stock() -> Cost:
            return _steady(_stock_batches(contents, views, batch, threads), warm, count, batch)

        sides = {"ours": ours, "augmentation": augmentation, "stock": stock}
        sides |= _limit_sides(order, views, count, f"{folder}/tiny")
        fetched = 0.0
        if data and not files.is_local(data):
            copied = Order(remote.copy(order.index, f"{folder}/copy"), 0, order.streams, batch)
            sides["ours, local"] = partial(ours, copied)
            fetched = remote.fetched_share(order, lambda order: _ours(order, views, threads))
        costs = alternate(sides, rounds)

    source = files.redact(data) or "drawn photos"
    title = [
        f"input: {source}, {size} px, batch {batch}, threads or workers {threads}",
        f"medians of {rounds} rounds of {count * batch} images",
    ]
    return Report(title, _rows(costs, fetched, device.type), out)


def _rows(costs: dict[str, list[Cost]], fetched: float, device: str) -> list[Row]:
    ours, colors, stock = costs["ours"], costs["augmentation"], costs["stock"]
    rows = speeds("host work with a GPU: read, decode, two crops", ours, stock)
    rows += speeds(f"augmentation on {device}", colors)
    if local := costs.get("ours, local"):
        rows += speeds("object store", ours, local, "local disk")
        rows.append(Row("bytes fetched / bytes of the images", fetched, "x"))
    rows += _limit_rows(costs)
    if not CUDA:
        total = [a.then(b) for a, b in zip(ours, colors, strict=True)]
        rows += speeds("all on the CPU: read, decode, augment", total, stock)
    return rows


def _limit_sides(
    order: Order, views: ViewsConfig, count: int, folder: str
) -> dict[str, Callable[[], Cost]]:
    """Return what bounds ours: the limit of a core, and ours with several numbers of threads."""
    work = limits.list_work(order, views, count)
    sides: dict[str, Callable[[], Cost]] = {}
    sides["limit"] = partial(limits.measure_limit, work, views.size)
    index = limits.draw_tiny(folder, max(limits.TINY_IMAGES, order.batch))
    tiny = Order(index, 0, order.streams, order.batch)
    small, many = ViewsConfig(size=limits.TINY), 10 * count

    def ours(order: Order, views: ViewsConfig, threads: int, count: int) -> Cost:
        warm = limits.batches_to_fill(threads, order.batch)
        enough = limits.batches_to_smooth(threads, order.batch)
        with closing(_ours(order, views, threads)) as batches:
            return _steady(batches, warm, max(count, enough), order.batch)

    for n in limits.THREADS:
        sides[f"{n} threads"] = partial(ours, order, views, n, count)
        sides[f"tiny, {n} threads"] = partial(ours, tiny, small, n, many)
    return sides


def _limit_rows(costs: dict[str, list[Cost]]) -> list[Row]:
    """Make the rows of how near ours comes to the limit of a core, and what threads add to that."""
    rows = speeds("limit: decode, two crops, one thread", costs["limit"])
    seconds, least = ([cost.cpu for cost in costs[side]] for side in ("ours", "limit"))
    own, most = 1 / median(seconds), 1 / median(least)
    beside = ratio(least, seconds)
    rows.append(Row("ours / limit", own, "images/core-s", most, "limit", beside, limit=most))
    python = limits.python_seconds(costs["tiny, 1 threads"])
    rows.append(Row("Python of an image, at most", python * 1e6, "us"))
    rows.append(Row("what this allows a process", 1 / python, "images/s"))
    for n in limits.THREADS:
        rows += speeds(f"ours with {n} threads", costs[f"{n} threads"])
        rows += speeds(f"the same, {limits.TINY} px images", costs[f"tiny, {n} threads"])
    return rows


def _steady(batches: Iterator[object], warm: int, count: int, size: int) -> Cost:
    """Measure the cost of an image once the pipeline runs.

    The first `warm` batches do not count. The `count` batches after them have `size` images each.
    """
    repeat(lambda: next(batches), warm)
    return measure(lambda: repeat(lambda: next(batches), count), count * size)


def _ours(order: Order, views: ViewsConfig, threads: int) -> TrainLoader:
    streams = rank_streams(order.streams, rank=0, world=1)
    assignment = Assignment(order, streams, views, DataConfig(), threads)
    return TrainLoader(assignment, partial(print, file=sys.stderr), pin_memory=CUDA)


def _device_batch(order: Order, views: ViewsConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Load one batch's crops [V*B, 3, S, S] and parameters [V*B, P] to the device."""
    with closing(_ours(order, views, threads=1)) as batches:
        batch = next(batches)
    return batch.views.flatten(0, 1).to(device), batch.params.flatten(0, 1).to(device)


class _StockImages(Dataset[tuple[Tensor, Tensor]]):
    """Both augmented views of JPEGs that are in memory.

    An image is decoded once, and torchvision then augments the PIL image.
    """

    def __init__(self, contents: list[bytes], views: ViewsConfig) -> None:
        self.contents = contents
        self.view1, self.view2 = (_stock_view(views, view) for view in views.views)

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image = Image.open(io.BytesIO(self.contents[place])).convert("RGB")
        return self.view1(image), self.view2(image)


def _stock_view(views: ViewsConfig, view: ViewConfig) -> Callable[[Image.Image], Tensor]:
    jitter = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    blur = transforms.Lambda(partial(_blur, sigma=view.blur_sigma))
    bicubic = transforms.InterpolationMode.BICUBIC
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop(views.size, views.area, views.ratio, bicubic),
            transforms.RandomHorizontalFlip(view.flip),
            transforms.RandomApply([jitter], view.jitter),
            transforms.RandomGrayscale(view.grayscale),
            transforms.RandomApply([blur], view.blur),
            transforms.RandomSolarize(128, view.solarize),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return composed


def _blur(image: Image.Image, sigma: tuple[float, float]) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma)))


def _stock_batches(
    contents: list[bytes], views: ViewsConfig, batch: int, workers: int
) -> Iterator[object]:
    return iter(
        DataLoader(
            _StockImages(contents, views),
            batch,
            sampler=itertools.cycle(range(len(contents))),
            num_workers=workers,
            pin_memory=CUDA,
            multiprocessing_context="fork",  # so that the images' bytes are shared and not sent
        )
    )


def read_contents(order: Order, steps: int) -> list[bytes]:
    """Read the image files of the first `steps` batches, in the order of TrainLoader.

    It reads one epoch at most.
    """
    fetch = cache(BlockReader(order.index).fetch)
    contents = []
    for step in range(min(steps, order.steps_per_epoch)):
        for stream in range(order.streams):
            for segment in order.batch_segments(step, stream):
                block = fetch(segment.shard, segment.block)
                for place in segment.rows.tolist():
                    offset, length = block.samples[place].image or (0, 0)
                    contents.append(bytes(block.content[offset : offset + length]))
    return contents


def _find_index(data: str, folder: str, batch: int) -> Index:
    """Return the index of `data`. When there is none, make one in `folder`."""
    if not data:
        index = _draw_photos(folder, max(PHOTOS, batch))
    elif files.exists(files.join(data, indexes.NAME)):
        index = indexes.load(data, "--data")
    else:
        found = scan.index_tars(
            find_tars([data]),
            out=folder,
            layout=Layout(),
            classes=None,
            skip_damaged=False,
            threads=4,
            report=lambda _: None,
        )
        scan.save(found, report=lambda _: None)
        index = found.made
    if index.samples < batch:
        raise InputError(
            f"--data {files.redact(data)}: {index.samples} images, fewer than --batch {batch}"
        )
    return index


def _draw_photos(url: str, count: int) -> Index:
    photos = {f"{i}.jpg": draw_photo(i) for i in range(count)}
    entries = [pack.Image(path, len(content), -1) for path, content in photos.items()]
    plan = pack.plan_shards(pack.ImageSet("", entries, []), 16_000_000, seed=0)
    index, _ = pack.write_shards(plan, url, lambda image: photos[image.path], threads=2)
    return index


def draw_photo(seed: int) -> bytes:
    """Draw a JPEG with soft shapes under fine grain, like ImageNet's: 500x375 and about 100 KB."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    soft = np.asarray(shapes.resize((500, 375), Image.Resampling.BICUBIC))
    picture = np.clip(soft + rng.normal(0, 16, (375, 500, 1)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()
