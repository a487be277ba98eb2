"""Law 1: which samples make up a batch is a function of index, seed, streams, batch and step.

The properties are checked on indexes of random shape; `check_epoch` is itself checked, on orders
with planted faults. tests/golden/order.json freezes the order: it was written by

    from tests.shards.test_order import GOLDEN, golden_order
    GOLDEN.write_text(json.dumps(golden_order()) + "\n")

and a change of it is a new version of the index.
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import index
from shards.blocks import checksum
from shards.errors import InputError
from shards.index import Index, Shard
from shards.order import Order, Segment, rank_streams
from shards.philox import Domain, permutation
from tests.helpers.places import GOLDEN

GOLDEN = GOLDEN / "order.json"

Shape = list[list[int]]  # samples of each block of each shard


def make_index(shape: Shape) -> Index:
    shards = []
    for i, samples in enumerate(shape):
        offsets = 1024 * (np.cumsum(samples) - samples)
        blocks = np.stack((offsets, samples), axis=1).astype(np.int64)
        size = 1024 * sum(samples)
        shards.append(Shard(f"{i}.tar", sum(samples), size, blocks, checksum(blocks)))
    return Index("memory://order", shards)


shapes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=6)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    found = make_index(draw(shapes))
    streams = draw(st.integers(1, min(6, found.samples)))
    batch = streams * draw(st.integers(1, found.samples // streams))
    return Order(found, draw(st.integers(0, 2**64 - 1)), streams, batch)


RankBatch = Callable[[Order, int, int, int], list[list[int]]]  # order, step, rank, world -> streams


def rank_batch(order: Order, step: int, rank: int, world: int) -> list[list[int]]:
    """The ids that each stream of a rank gives to a batch."""
    return [stream_ids(order, step, c) for c in rank_streams(order.streams, rank, world)]


def stream_ids(order: Order, step: int, stream: int) -> list[int]:
    return [i for segment in order.batch_segments(step, stream) for i in segment.ids.tolist()]


def check_epoch(order: Order, epoch: int, rank_batch: RankBatch = rank_batch) -> None:
    """Every sample at most once, exactly U of them; the same batches at every world size."""
    used: list[int] = []
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        reference = [stream_ids(order, step, c) for c in range(order.streams)]
        for world in range(1, order.streams + 1):
            parts = [rank_batch(order, step, rank, world) for rank in range(world)]
            together = [ids for part in parts for ids in part]
            for micros in range(1, order.rows + 1):
                if order.rows % micros == 0:
                    assert slices(together, micros) == slices(reference, micros)
        used += [i for ids in reference for i in ids]
    assert len(used) == len(set(used)) == order.index.samples // order.batch * order.batch
    assert set(used) <= set(range(order.index.samples))


def slices(streams: list[list[int]], micros: int) -> list[set[int]]:
    """The samples of each micro-batch: the m-th of M equal slices of every stream."""
    part = len(streams[0]) // micros
    return [{i for ids in streams for i in ids[m * part : (m + 1) * part]} for m in range(micros)]


@settings(max_examples=80, deadline=None)
@given(orders(), st.integers(0, 2**31))
def test_epoch(order: Order, epoch: int) -> None:
    check_epoch(order, epoch)


@settings(max_examples=80, deadline=None)
@given(orders(), st.integers(0, 1000))
def test_as_the_words_say_it(order: Order, epoch: int) -> None:
    """The whole sequence built in the plainest way, cut into streams and batches."""
    found, sequence = order.index, []
    for shard in permutation(order.seed, Domain.SHARDS, np.arange(len(found.shards)), epoch):
        counts = found.blocks(shard)[:, 1]
        firsts = np.array([found.first_id(shard, b) for b in range(len(counts))])
        for block in permutation(order.seed, Domain.BLOCKS, firsts, epoch):
            ids = np.arange(firsts[block], firsts[block] + counts[block])
            sequence += ids[permutation(order.seed, Domain.SAMPLES, ids, epoch)].tolist()
    steps = found.samples // order.batch
    streams = np.array(sequence[: steps * order.batch]).reshape(order.streams, steps, order.rows)
    for k in range(steps):
        for c in range(order.streams):
            assert stream_ids(order, epoch * steps + k, c) == streams[c, k].tolist()


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 20), st.data())
def test_a_position_is_arithmetic(order: Order, start: int, data: st.DataObject) -> None:
    """A fresh order asked for one step gives what one that walked there gives."""
    stream = data.draw(st.integers(0, order.streams - 1))
    walked = [order.batch_segments(step, stream) for step in range(start + 5)]
    fresh = Order(order.index, order.seed, order.streams, order.batch)
    for step in range(start, start + 5):
        assert_equal(fresh.batch_segments(step, stream), walked[step])
    need = without_repeats((s.shard, s.block) for step in walked[start:] for s in step)
    ahead = without_repeats(islice(fresh.stream_blocks(start, stream), 10 * len(need) + 10))
    assert ahead[: len(need)] == need


def assert_equal(a: list[Segment], b: list[Segment]) -> None:
    assert [(s.shard, s.block) for s in a] == [(s.shard, s.block) for s in b]
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.ids, other.ids)


def without_repeats(
    blocks: Iterator[tuple[int, int]] | list[tuple[int, int]],
) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for block in blocks:
        if not result or result[-1] != block:
            result.append(block)
    return result


BIG: Shape = [[40, 35, 45], [50, 50], [30, 60, 20, 10], [80]]  # 420 samples


def test_epochs_and_seeds_differ() -> None:
    order = Order(make_index(BIG), 3, 4, 64)
    assert order.steps_per_epoch == 6
    sequences, dropped = [], []
    for epoch in range(6):
        ids = [i for k in range(6) for c in range(4) for i in stream_ids(order, 6 * epoch + k, c)]
        sequences.append(tuple(ids))
        dropped.append(frozenset(range(420)) - set(ids))
    assert len(set(sequences)) == len(set(dropped)) == 6
    assert all(len(rest) == 36 for rest in dropped)
    other = Order(make_index(BIG), 4, 4, 64)
    assert stream_ids(other, 0, 0) != stream_ids(order, 0, 0)


def test_batches_mix_distant_places() -> None:
    """A batch takes from as many blocks as there are streams, or nearly."""
    order = Order(make_index(BIG), 0, 8, 64)
    places = {(s.shard, s.block) for c in range(8) for s in order.batch_segments(2, c)}
    assert len(places) >= 6


def test_a_batch_does_not_look_at_all_blocks_of_a_shard() -> None:
    """One tar of 400 GB has 100,000 blocks. All streams of a batch come from it."""

    class Listed(np.ndarray):
        longest = 0

        def tolist(self) -> Any:
            Listed.longest = max(Listed.longest, len(self))
            return super().tolist()

    order = Order(make_index([[4] * 500]), 0, 4, 40)
    blocks, ends = order._block_order(0, 0)
    order._blocks[0, 0] = blocks.view(Listed), ends.view(Listed)
    found = [order.batch_segments(step, 1) for step in range(5)]
    assert sum(len(segment.rows) for step in found for segment in step) == 50
    assert 3 <= Listed.longest <= 4  # 10 samples lie in so many blocks of 4


def golden_order() -> dict[str, object]:
    shape, seed, streams, batch = [[5, 3], [7], [4, 6, 2], [9]], 2**40 + 7, 3, 6
    order = Order(make_index(shape), seed, streams, batch)
    steps = 2 * order.steps_per_epoch
    batches = [[stream_ids(order, k, c) for c in range(streams)] for k in range(steps)]
    setting = {"shape": shape, "seed": seed, "streams": streams, "batch": batch}
    return setting | {"version": index.VERSION, "batches": batches}


def test_golden() -> None:
    assert golden_order() == json.loads(GOLDEN.read_text())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.data())
def test_ranks_share_out_the_streams(streams: int, data: st.DataObject) -> None:
    world = data.draw(st.integers(1, streams))
    parts = [list(rank_streams(streams, rank, world)) for rank in range(world)]
    assert [c for part in parts for c in part] == list(range(streams))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_impossible_settings() -> None:
    found = make_index(BIG)
    with pytest.raises(InputError, match=r"batch\.size 48 is not divisible by data\.streams 64"):
        Order(found, 0, 64, 48)
    with pytest.raises(InputError, match=r"use --data\.streams 4 or --batch\.size 50$"):
        Order(found, 0, 5, 48)
    with pytest.raises(InputError, match=r"data\.streams 0"):
        Order(found, 0, 0, 48)
    with pytest.raises(InputError, match=r"420 samples, fewer than batch\.size 512"):
        Order(found, 0, 4, 512)
    with pytest.raises(InputError, match=r"5 processes but data\.streams is 4: start at most 4"):
        rank_streams(4, 0, 5)


# Planted faults: check_epoch must see them.


def swapped_ends(order: Order, step: int, rank: int, world: int) -> list[list[int]]:
    """One rank reads its neighbour's first stream for its own."""
    streams = list(rank_streams(order.streams, rank, world))
    if world > 1 and rank == 0:
        streams[-1] += 1
    return [stream_ids(order, step, c) for c in streams]


def keyed_by_world(order: Order, step: int, rank: int, world: int) -> list[list[int]]:
    """The order drawn anew for each world size, as a worker's own generator would."""
    other = Order(order.index, order.seed + world - 1, order.streams, order.batch)
    return rank_batch(other, step, rank, world)


def keyed_by_worker(order: Order, step: int, rank: int, world: int) -> list[list[int]]:
    """Each stream's rows shuffled by a generator that knows the rank: wrong micro-batches."""
    found = rank_batch(order, step, rank, world)
    return [np.random.default_rng(rank).permutation(ids).tolist() for ids in found]


@pytest.mark.parametrize("fault", [swapped_ends, keyed_by_world, keyed_by_worker])
def test_planted_fault_in_the_sharing(fault: RankBatch) -> None:
    order = Order(make_index(BIG), 1, 4, 64)
    check_epoch(order, 0)
    with pytest.raises(AssertionError):
        check_epoch(order, 0, fault)


def test_planted_fault_in_the_sequence() -> None:
    """Streams that overlap by one row."""

    class Overlapping(Order):
        def batch_segments(self, step: int, stream: int) -> list[Segment]:
            epoch, k = divmod(step, self.steps_per_epoch)
            start = (stream * self.steps_per_epoch + k) * self.rows - (stream > 0)
            return list(self.segments(epoch, start, start + self.rows))

    with pytest.raises(AssertionError):
        check_epoch(Overlapping(make_index(BIG), 1, 4, 64), 0)
