"""Measure how long a rank takes from index.json to its batch at any step.

Our order is measured beside a permutation of all samples.
"""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from torch.utils.data import BatchSampler, Dataset, DistributedSampler

from launch.benchmarks.measuring import (
    alternate,
    host_peak,
    require_positive,
    reset_host_peak,
)
from launch.benchmarks.results import Ratio, Report, Row, check_out, compare
from shards import index as indexes
from shards.blocks import Blocks, checksum
from shards.errors import InputError
from shards.index import BLOCK_BYTES, Index, Shard
from shards.order import Order, rank_streams
from shards.storage import files

SAMPLE_BYTES = 100_000  # about the size of an ImageNet image
FAR = 1000  # number of the far epoch, whose middle step is measured too
VISITS = (1, 2, 4, 8)  # numbers of steps, each planned for all ranks

_T = TypeVar("_T")


@dataclass(frozen=True)
class Setting:
    """A data set, and how `ranks` processes train on it."""

    url: str
    samples: int
    streams: int
    batch: int
    ranks: int

    def load(self) -> Order:
        index = indexes.load(self.url, "--samples")
        return Order(index, 0, self.streams, self.batch)

    def plan(self, order: Order, rank: int, step: int) -> None:
        """Compute which samples the rank gives to the batch of `step`."""
        for stream in rank_streams(self.streams, rank, self.ranks):
            order.batch_segments(step, stream)

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch

    @property
    def steps(self) -> list[int]:
        """The first, middle and last step of the first epoch, and the middle one of a far epoch."""
        epoch = self.steps_per_epoch
        return sorted({0, epoch // 2, epoch - 1, FAR * epoch + epoch // 2})


class Start(NamedTuple):
    """Seconds until the first batch is planned."""

    load: float
    plan: float


def bench_order(
    *,
    samples: int = 1_000_000_000,
    shards: int = 100_000,
    ranks: int = 4096,
    streams: int = 8192,
    batch: int = 65_536,
    walk: int = 2000,
    stock: int = 10_000_000,
    rounds: int = 3,
    out: str = "",
) -> Report:
    """Measure how long a rank takes from index.json to its batch at any step.

    Ours reads index.json from a local disk, checks that every shard is there and has its length,
    reads the sidecars that it needs and computes which samples the rank takes at the step. The
    index and the sidecars are real. The shards are files of the right length without content. All
    of them are in a temporary folder, by default 200,000 files, and in the page cache.

    Stock, the usual way, is a DistributedSampler under a BatchSampler that skips to the step. It
    reads nothing and loads no image of a skipped batch. It permutes all samples in memory, at about
    48 bytes each. So the two are compared on a smaller data set, with as many samples in a shard.

    Both sides run on one core. Memory is the growth of fresh processes.

    Args:
        samples: Number of samples in the data set.
        shards: Number of shards in the data set. They have equal sizes.
        ranks: Number of processes that share out a batch.
        streams: Parallel readers that an epoch is cut into, which is data.streams of a recipe.
        batch: Images in the global batch.
        walk: Consecutive batches that a rank plans across the end of an epoch, to see memory grow.
        stock: Samples in the smaller data set, on which stock and ours are compared. At most
            `samples` are used.
        rounds: Number of times that each start is measured.
        out: File that the rows are also written to, as JSON.
    """
    check_out(out)
    require_positive(samples=samples, shards=shards, ranks=ranks, streams=streams, batch=batch)
    require_positive(walk=walk, stock=stock, rounds=rounds)
    common = min(stock, samples)
    _check(common, samples, shards, ranks, streams, batch)
    with TemporaryDirectory() as folder:
        full = Setting(f"{folder}/full", samples, streams, batch, ranks)
        small = Setting(f"{folder}/small", common, streams, batch, ranks)
        write_data_set(full, shards)
        write_data_set(small, math.ceil(shards * common / samples))
        cases = {
            f"rank {rank:,}, step {step:,}": partial(start, full, rank, step)
            for rank in sorted({0, ranks // 2, ranks - 1})
            for step in full.steps
        }
        starts = alternate(cases, rounds)
        where = small, ranks // 2, small.steps_per_epoch // 2
        sides: dict[str, Callable[[], Start]] = {
            "ours": partial(start, *where),
            "stock": partial(stock_start, *where),
        }
        costs = alternate(sides, rounds)
        memory = {name: _in_fresh_process(growth, sides[name]) for name in sides}
        walked = _in_fresh_process(walk_growths, full, ranks // 2, walk)

    title = [
        f"order: {samples:,} samples, {shards:,} shards, {ranks:,} ranks, {streams:,} streams,",
        f"batch {batch:,}, {full.steps_per_epoch:,} steps an epoch; medians of {rounds} rounds",
    ]
    rows = [_tell_start(name, values) for name, values in starts.items()]
    slowest = max(median(map(sum, values)) for values in starts.values())
    rows.append(Row("slowest start", slowest, "s"))
    rows += [Row(f"memory: {name}", grown / 1e6, "MB") for name, grown in walked.items()]
    seconds = {name: [sum(value) for value in values] for name, values in costs.items()}
    name = f"order at a step, {common:,} samples"
    rows.append(compare(name, seconds["ours"], seconds["stock"], "s"))
    own, theirs = memory["ours"] / 1e6, memory["stock"] / 1e6
    less = Ratio(theirs / own, theirs / own, theirs / own)
    rows.append(Row(f"memory of {name}", own, "MB", theirs, "stock", less))
    return Report(title, rows, out)


def _tell_start(name: str, values: list[Start]) -> Row:
    load, plan = (median(column) for column in zip(*values, strict=True))
    note = f"{load:.3f} s until the index is loaded, {plan:.3f} s to the order at the step"
    return Row(name, median(map(sum, values)), "s", note=note)


def _check(common: int, samples: int, shards: int, ranks: int, streams: int, batch: int) -> None:
    if batch > common:
        name = "stock" if common < samples else "samples"
        raise InputError(f"--{name} {common} is less than --batch {batch}")
    if shards > samples:
        raise InputError(f"--shards {shards} is more than --samples {samples}")
    if batch % streams:
        raise InputError(f"--batch {batch} is not divisible by --streams {streams}")
    if ranks > streams:
        raise InputError(f"--ranks {ranks} is more than --streams {streams}")


def start(setting: Setting, rank: int, step: int) -> Start:
    """Load the index and plan the batch, as a process does before it can fetch the first image."""
    begin = time.perf_counter()
    order = setting.load()
    loaded = time.perf_counter()
    setting.plan(order, rank, step)
    return Start(loaded - begin, time.perf_counter() - loaded)


def stock_start(setting: Setting, rank: int, step: int) -> Start:
    """Plan the batch with PyTorch's samplers, for comparison with `start`."""
    begin = time.perf_counter()
    epoch, k = divmod(step, setting.steps_per_epoch)
    images = cast(Dataset[Any], range(setting.samples))  # samplers only need its length
    sampler: DistributedSampler[Any] = DistributedSampler(
        images, setting.ranks, rank, drop_last=True
    )
    sampler.set_epoch(epoch)
    batches = BatchSampler(sampler, setting.batch // setting.ranks, drop_last=True)
    next(islice(batches, k, None))
    return Start(0.0, time.perf_counter() - begin)


def growth(work: Callable[[], object]) -> int:
    """Return the bytes that a call of `work` adds to this process's peak, at least one page."""
    held = reset_host_peak()
    work()
    return max(os.sysconf("SC_PAGE_SIZE"), host_peak() - held)


def walk_growths(setting: Setting, rank: int, walk: int) -> dict[str, int]:
    """Plan many batches, and return by how many bytes this process has grown after each part.

    The last parts plan the batches of all ranks, as one process alone would. These visit most
    shards of the data set, so they show how large the caches become.
    """
    grown = {}
    held = reset_host_peak()
    order = setting.load()
    setting.plan(order, rank, 0)
    grown["first batch"] = host_peak() - held
    first = max(0, setting.steps_per_epoch - walk // 2)
    for step in range(first, first + walk):
        setting.plan(order, rank, step)
    grown[f"{walk:,} batches"] = host_peak() - held
    visited = 0
    for visits in VISITS:
        for visit in range(visited, visits):
            step = setting.steps_per_epoch * visit // max(VISITS)
            for other in range(setting.ranks):
                setting.plan(order, other, step)
        visited = visits
        grown[f"all ranks, {visits} step(s)"] = host_peak() - held
    return grown


def _in_fresh_process(work: Callable[..., _T], *arguments: object) -> _T:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, *arguments).result()


def write_data_set(setting: Setting, shards: int) -> None:
    """Write index.json, sidecars, and shards of the right length without content."""
    ends = setting.samples * np.arange(shards + 1) // shards
    sizes = np.diff(ends).tolist()  # there is one size, or two that differ by one sample
    kinds = {samples: _blocks(samples) for samples in set(sizes)}
    os.mkdir(setting.url)
    for samples, blocks in kinds.items():
        files.write(f"{setting.url}/{samples}.json", json.dumps(blocks.tolist()).encode())
    entries = []
    for i, samples in enumerate(sizes):
        blocks, name = kinds[samples], f"shard-{i:06d}.tar"
        length = samples * SAMPLE_BYTES
        entries.append(Shard(name, samples, length, blocks, checksum(blocks)))
        # Equal shards share a sidecar, because 100,000 sidecars would fill 800 MB.
        os.symlink(f"{samples}.json", f"{setting.url}/{indexes.sidecar(name)}")
        with open(f"{setting.url}/{name}", "wb") as file:
            file.truncate(length)
    document = Index(setting.url, entries).document(inline=False)
    files.write(files.join(setting.url, indexes.NAME), json.dumps(document).encode())


def _blocks(samples: int) -> Blocks:
    """Make the blocks of a shard. Each block has as many samples as fit into it."""
    most = BLOCK_BYTES // SAMPLE_BYTES
    firsts = np.arange(0, samples, most)
    return np.stack((firsts * SAMPLE_BYTES, np.minimum(most, samples - firsts)), axis=1)
