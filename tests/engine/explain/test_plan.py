"""Landmarks, speeds and counts, beside what a run does."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engine.explain import plan, traffic
from engine.method.durations import is_due
from engine.recipe import Recipe
from engine.state.checkpoint import CheckpointConfig
from shards import index as indexes
from shards.errors import InputError
from shards.index import Index
from shards.loader import Assignment, DataConfig, TrainLoader
from shards.order import BatchConfig, Order
from shards.views import ViewsConfig
from tests.conftest import Files, PackFiles
from tests.helpers import tiny
from tests.helpers.clocks import stop_clock
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.training import finish, training


def test_landmarks_are_those_of_the_training(tiny_data: DataConfig, tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path, probe=tiny.NO_PROBE)
    with training(recipe) as trainer:
        finish(trainer)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"] - 1: (line["lr"], line["tau"]) for line in lines}
    marks = plan.find_landmarks(recipe, tiny.SAMPLES, 0)
    assert {mark.step for mark in marks} == {0, 3, 4, 5, 10, 15, 20}
    assert (marks[-1].name, marks[-1].step) == ("end", trainer.total_steps)
    (warm,) = (mark for mark in marks if "warm-up" in mark.name)
    assert warm.step == trainer.warmup_steps
    for mark in marks:
        if mark.step == 20:
            continue  # no update follows it
        assert rates[mark.step] == (mark.lr, mark.tau)
    assert marks[-1].lr == 0
    late = plan.find_landmarks(recipe, tiny.SAMPLES, 13)
    assert {m.name: m.step for m in late}["next checkpoint"] == 16
    assert "next checkpoint" not in {m.name for m in plan.find_landmarks(recipe, tiny.SAMPLES, 20)}


@pytest.mark.parametrize("every", [1, 3, 4, 7, 20, 30])
@pytest.mark.parametrize("keep_every", [0, 2, 3, 6, 100])
def test_checkpoints_that_are_written_and_stay(every: int, keep_every: int) -> None:
    recipe = Recipe(checkpoint=CheckpointConfig(every=every, keep=2, keep_every=keep_every))
    for total in (1, 19, 20, 36):
        written = [step for step in range(1, total + 1) if step % every == 0 or step == total]
        kept: list[int] = []
        for step in written:  # as checkpoint.prune does after each
            kept.append(step)
            kept = [s for s in kept[:-2] if keep_every and s % keep_every == 0] + kept[-2:]
        found = traffic.save_run(recipe, total)
        assert (found.written, found.kept) == (len(written), len(kept))


@pytest.mark.parametrize("every", ["7/2 steps", "1.5 steps", "0.5 steps", "3 steps", 4, 0])
@pytest.mark.parametrize("keep_every", [0, 2, 7, "7/2 steps", "0.5 steps"])
def test_fractions_of_steps(every: int | str, keep_every: int | str) -> None:
    """An epoch may have no whole number of steps between two checkpoints."""
    recipe = Recipe(checkpoint=CheckpointConfig(every=every, keep=2, keep_every=keep_every))
    for total in (1, 20, 21, 22):
        written = [s for s in range(1, total + 1) if is_due(every, s) or s == total]
        old = [step for step in written[:-2] if is_due(keep_every, step)]
        found = traffic.save_run(recipe, total)
        assert (found.written, found.kept) == (len(written), len(old) + len(written[-2:]))
        assert plan.count_due(plan.cadence(every), total) == len(written)


def test_no_cadence_saves_the_last_step_only() -> None:
    recipe = Recipe(checkpoint=CheckpointConfig(every=0, keep_every=5))
    assert traffic.save_run(recipe, 100) == (1, 1)


def test_where_the_speed_comes_from() -> None:
    log: list[dict[str, Any]] = [{"step": n, "images_per_second": 10.0 * n} for n in range(1, 41)]
    assert plan.find_speed(5.0, log, 8) == (40.0, "5 images a second of each process, as given")
    found = plan.find_speed(None, log, 8)
    assert found is not None
    assert found.images == 305.0  # the median of 210 to 400
    each = [line | {"images_per_second_device": 7.0} for line in log]
    found = plan.find_speed(None, each, 8)
    assert found is not None
    assert found.images == 56.0
    assert plan.find_speed(None, [{"step": 1}, {"step": 2, "images_per_second": None}], 8) is None


def test_dates(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_clock(monkeypatch, plan, datetime(2026, 3, 1, 22, 30, tzinfo=UTC))
    assert plan.date_of(2 * 3600) == "2026-03-02 00:30"
    assert plan.date_of(1e15) == "after the year 9999"
    assert plan.date_of(math.inf) == "after the year 9999"


def test_a_process_gets_its_streams() -> None:
    recipe = Recipe(batch=BatchConfig(size=48, micro=2), data=DataConfig(streams=12))
    assert plan.share_batch(recipe, 5) == ((2, 3), (8, 12), (4, 6), 24)
    with pytest.raises(InputError, match=r"13 processes but data\.streams is 12"):
        plan.share_batch(recipe, 13)


def loader_of(order: Order) -> TrainLoader:
    views, config = ViewsConfig(size=16), DataConfig(prefetch=0)
    return TrainLoader(Assignment(order, range(order.streams), views, config, 2), print)


@pytest.mark.parametrize("streams", [1, 3])
def test_requests_of_an_epoch(packed: Index, streams: int) -> None:
    """Beside the blocks that the batches' own samples lie in."""
    order = Order(packed, 0, streams, 15)
    requests = size = 0
    for stream in range(streams):
        last = None
        for step in range(order.steps_per_epoch):
            for segment in order.batch_segments(step, stream):
                if last != (last := (segment.shard, segment.block)):
                    start, stop = packed.block_range(*last)
                    requests, size = requests + 1, size + stop - start
    recipe = Recipe(data=DataConfig(streams=streams), batch=BatchConfig(size=15))
    blocks = sum(len(packed.blocks(shard)) for shard in range(len(packed.shards)))
    assert traffic.read_epoch(recipe, order) == (90, requests, size, 0, 0, blocks, True)


def test_requests_that_a_store_gets(
    proxy: FaultProxy, s3: str, pack_files: PackFiles, photos: Files
) -> None:
    pack_files(f"{s3}/photos", photos)
    found = indexes.load(f"{s3}/photos", "data.train")
    order, epochs = Order(found, 0, 1, 15), 10
    recipe = Recipe(data=DataConfig(streams=1, prefetch=0), batch=BatchConfig(size=15))
    expected = traffic.read_epoch(recipe, order)
    before = proxy.requests(r"^GET .*/shard-\d+\.tar")
    loader = loader_of(order)
    for _ in range(epochs * order.steps_per_epoch):
        next(loader)
    requests = proxy.requests(r"^GET .*/shard-\d+\.tar") - before
    loader.close()
    blocks = sum(len(found.blocks(shard)) for shard in range(len(found.shards)))
    assert epochs * expected.requests <= requests <= epochs * expected.requests + blocks


def test_a_cache_saves_the_requests_of_what_it_keeps(packed: Index, tmp_path: Path) -> None:
    first = packed.shards[0].bytes
    fields = {"streams": 1, "cache": str(tmp_path), "cache_gb": (first + 1) / 1e9}
    recipe = Recipe(data=DataConfig(**fields), batch=BatchConfig(size=15))  # type: ignore[arg-type]
    order = Order(packed, 0, 1, 15)
    assert traffic.read_epoch(recipe, order).kept_requests == 0  # local data is not kept
    packed.base = "s3://bucket/photos"
    found = traffic.read_epoch(recipe, order)
    assert found.kept_requests == len(packed.blocks(0))
    assert 0.9 * first < found.kept_bytes <= first


def test_sidecars_are_estimated_and_not_read(packed: Index) -> None:
    order = Order(packed, 0, 3, 15)
    recipe = Recipe(data=DataConfig(streams=3), batch=BatchConfig(size=15))
    exact = traffic.read_epoch(recipe, order)
    for shard in packed.shards:
        shard.blocks = None
    found = traffic.read_epoch(recipe, order)
    assert not found.exact
    size = sum(shard.bytes for shard in packed.shards)
    assert size <= found.bytes < exact.bytes * 1.2
    assert found.requests == sum(-(-s.bytes // indexes.BLOCK_BYTES) for s in packed.shards) + 2
