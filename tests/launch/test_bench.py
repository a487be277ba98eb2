"""The benches run and say how the sides compare; what stock computes is what ours computes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engine.method import byol
from engine.method.byol import BYOLConfig
from engine.method.clipping import ClipConfig
from engine.method.norm import BatchNorm
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from engine.method.sgd import SGDConfig
from engine.processes.step_graph import WARM_UP
from engine.recipe import Recipe, load
from launch import bench
from launch.benchmarks import variants
from launch.benchmarks.input import draw_photo
from launch.benchmarks.order import VISITS, Setting, write_data_set
from launch.benchmarks.plan import Entry, Spreading, Traffic, need
from launch.benchmarks.results import Row
from launch.benchmarks.step import prepare
from launch.benchmarks.stock import Stock
from shards.order import BatchConfig
from shards.storage import files
from shards.views import ViewsConfig
from tests.helpers.benches import rows, run
from tests.helpers.places import RECIPES
from tests.helpers.recorded_steps import Recorder

QUICKSTART = RECIPES / "quickstart.py"
TINY = """
from shards.loader import DataConfig
from tests.helpers import tiny

recipe = tiny.recipe(DataConfig(streams=4), "run")
"""


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(
        f"checkpoint --recipe {QUICKSTART} --url memory://bench --rounds 1 --starts 0", capsys
    )
    for place in ("local disk", "memory"):
        for side in ("in the background", "waiting"):
            assert rows(lines, f"checkpoint to {place}, {side}: ") == 2
    assert not files.list_names("memory://bench/bench_checkpoint")


def test_peers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightly")
    pytest.importorskip("kornia")
    options = "--size 32 --batch 4 --steps 1 --rounds 1 --threads 1 --precision fp32 --no-compile"
    lines = run(f"peers {options}", capsys)
    for row in ("step on augmented images", "training end to end", "views on the device"):
        assert rows(lines, row) == 2
    assert not [line for line in lines if "not installed" in line]


def test_variants(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--batch 8 --steps 1 --rounds 1 --threads 1 --precision fp32 --no-compile"
    lines = run(f"variants {options}", capsys)
    assert [rows(lines, name) for name in ("one forward", "channels_last")] == [2, 2]


def test_largest_finds_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It closes in on the largest batch, and stops within a sixteenth of it."""

    def find(fits: int, most: int) -> Row:
        monkeypatch.setattr(variants, "prepare", lambda *_: (None, None))
        monkeypatch.setattr(variants, "_try", lambda *given: 1.0 if given[2] <= fits else None)
        return variants._largest("plain", Recipe(), most)

    for fits in (8, 37, 500, 1000):
        found = find(fits, 4096).ours
        assert found is not None
        assert fits - max(1, fits // 16) < found <= fits
    assert find(5000, 100).ours == 100
    assert find(3, 4096).ours in (2, 3)


def test_photos_are_of_the_usual_size() -> None:
    assert 90_000 < len(draw_photo(0)) < 120_000


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("input --data NONE/such", "NONE/such: no such folder"),
        ("input --data memory://bench/tars", "memory://bench/tars: no such folder"),
        ("input --data tests", "no .tar files there"),
        ("input --threads 0", "--threads must be at least 1"),
        ("step --steps 0", "--steps must be at least 1"),
        ("step --recipe NONE.py", "no such recipe file"),
        ("order --ranks 0", "--ranks must be at least 1"),
        ("order --walk 0", "--walk must be at least 1"),
        ("order --ranks 9000", "--ranks 9000 is more than --streams 8192"),
        ("order --streams 5000", "--batch 65536 is not divisible by --streams 5000"),
        ("order --samples 5000", "--samples 5000 is less than --batch 65536"),
        ("order --stock 60000", "--stock 60000 is less than --batch 65536"),
        ("order --shards 2000000000", "--shards 2000000000 is more than --samples 1000000000"),
        ("plan --recipe NONE.py", "no such recipe file"),
        ("plan --processes 64 1", "--processes must be at least 2, not 1"),
        ("plan --processes 64 513", "513 processes but data.streams is 512"),
        ("plan --processes 64 --shard 7", "--shard 7: hsdp divides 64 processes into two or more"),
        ("plan --processes 8", "of at least two: give --shard 4, or leave hsdp out by"),
        ("plan --processes 7", "of at least two: leave hsdp out by --strategies ddp fsdp"),
        ("plan --shard 0", "--shard must be at least 1"),
        ("plan --classes -1", "--classes must be at least 0"),
        ("plan --out tests", "--out tests: is a folder"),
        ("all --out pyproject.toml/rows.json", "--out pyproject.toml/rows.json: cannot be written"),
        ("largest --most 7", "--most must be at least 8, not 7"),
        ("roofline --batch 1", "--batch must be at least 2, not 1"),
        ("all --rounds 0", "--rounds must be at least 1"),
        ("plan --width 0", "model.encoder.width must be from"),
    ],
)
def test_mistakes_are_one_line(
    command: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(command.split()) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert error in lines[0]


def test_order(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--samples 2050 --shards 13 --ranks 3 --streams 4 --batch 40 --walk 5 --stock 500"
    lines = run(f"order {options} --rounds 2", capsys)
    for rank in (0, 1, 2):
        for step in (0, 25, 50, 51_025):  # first, middle, last; far away
            assert rows(lines, f"rank {rank}, step {step:,} ") == 1
    assert rows(lines, "memory: ") == 2 + len(VISITS)
    assert rows(lines, "order at a step, 500 samples") == 1
    assert rows(lines, "memory of order at a step, 500 samples") == 1


def test_order_plans_on_a_sound_data_set(tmp_path: Path) -> None:
    """Its index, sidecars and shards pass every check, and each sample is in it once."""
    setting = Setting(str(tmp_path / "set"), samples=2051, streams=4, batch=40, ranks=3)
    write_data_set(setting, shards=13)
    order = setting.load()
    assert order.index.samples == 2051
    assert all(shard.blocks is None for shard in order.index.shards)
    for i, shard in enumerate(order.index.shards):
        blocks = order.index.blocks(i)
        assert blocks[:, 1].sum() == shard.samples
        assert blocks[0].tolist() == [0, 41]
    ids = [i.ids for i in order.segments(0, 0, 2051)]
    assert sorted(np.concatenate(ids).tolist()) == list(range(2051))


STEP_ROWS = {
    "step on augmented images": 2,
    "augmentation": 2,
    "training from the loader": 2,
    "first step, beyond a usual one": 1,
    "peak memory": 1,
    "data wait": 1,
    "loss of the same batch and weights": 1,
}


@pytest.mark.parametrize(
    "recipe",  # LARS, AdamW
    ["--precision fp32", f"--recipe {QUICKSTART} --precision fp16 --strategy ddp"],
)
def test_step(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--batch 8 --steps 1 --rounds 2 --threads 1 --no-compile"
    lines = run(f"step {recipe} {options} --peak-tflops 1", capsys)
    for row, times in STEP_ROWS.items():
        assert rows(lines, row) == times, row
    assert not torch.distributed.is_initialized()


def test_step_by_a_cuda_graph(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    options = "--batch 8 --steps 3 --rounds 2 --threads 1 --no-compile --precision fp32"
    lines = run(f"step {options} --cuda-graph", capsys)
    extra = {"step by a CUDA graph": 2, "peak memory with a CUDA graph": 1, "peak memory": 2}
    for row, times in (STEP_ROWS | extra).items():
        assert rows(lines, row) == times, row
    assert recorder.replays == WARM_UP + 1 + 2 * 3


@pytest.mark.slow
def test_step_of_two_processes() -> None:
    options = "--batch 8 --steps 1 --rounds 1 --threads 1 --no-compile --precision fp32"
    bench = f"launch/bench.py step --recipe {QUICKSTART} --strategy fsdp {options}"
    launcher = "torch.distributed.run --standalone --nproc-per-node=2"
    done = subprocess.run(
        [sys.executable, *f"-m {launcher} {bench} --peak-tflops 1".split()],
        cwd=QUICKSTART.parents[1],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for row, times in (STEP_ROWS | {"processes 2: ours fsdp, stock ddp": 1}).items():
        assert rows(lines, row) == times, row


@pytest.mark.parametrize(
    ("encoder", "changes"),  # the first encoder is torchvision's
    [
        (ResNetConfig(depth=18), {}),
        (ResNetConfig(depth=50, width=0.125, stem="cifar"), {}),
        (
            ResNetConfig(depth=10, width=0.125),
            {"optimizer": SGDConfig(nesterov=True), "clip": ClipConfig(norm=0.1, value=0.05)},
        ),
    ],
)
def test_stock_takes_the_same_step(
    encoder: ResNetConfig, changes: dict[str, Any], tmp_path: Path
) -> None:
    recipe = Recipe(
        threads=1,
        compile=False,
        batch=BatchConfig(8),
        model=BYOLConfig(encoder, hidden=32, projection=16),
        views=ViewsConfig(size=32),
        schedule=ScheduleConfig(epochs=20, warmup="2 epochs", base_lr=4.0),
        **changes,
    )
    trainer, batch = prepare(recipe, str(tmp_path))
    stock = Stock(trainer.recipe, trainer.classes, trainer.device)
    before = {name: p.clone() for name, p in stock.online.named_parameters()}
    views, params = (tensor.flatten(0, 1).to(trainer.device) for tensor in batch[:2])
    view1, view2 = trainer.augment(views, params).contiguous().chunk(2)

    ours = trainer.train_step(batch)
    loss = stock.step(view1, view2, batch.labels.to(trainer.device), ours.lr, ours.tau)

    torch.testing.assert_close(ours.loss, loss, rtol=1e-4, atol=1e-5)
    theirs = dict(stock.online.named_parameters())
    assert theirs.keys() == dict(trainer.online.named_parameters()).keys()
    for name, p in trainer.online.named_parameters():
        step, their_step = p - before[name], theirs[name] - before[name]
        assert (step - their_step).norm() <= 0.05 * step.norm() + 1e-7, name
    for name, p in trainer.target.named_parameters():
        torch.testing.assert_close(p, stock.target.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_large_views_are_cut_from_photos(tmp_path: Path) -> None:
    encoder = ResNetConfig(depth=10, width=0.125)
    recipe = Recipe(
        threads=1,
        compile=False,
        batch=BatchConfig(4),
        model=BYOLConfig(encoder, hidden=32, projection=16),
        views=ViewsConfig(size=96),
    )
    trainer, batch = prepare(recipe, str(tmp_path))
    assert batch.views.shape == (2, 4, 3, 96, 96)
    assert sorted(batch.labels.tolist()) == [0, 1, 2, 3]
    assert trainer.data.train.classes


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Iterator[Path]:
    """A recipe file; no process group may be left of what is done with it."""
    path = tmp_path / "tiny_recipe.py"
    path.write_text(TINY)
    yield path
    left = dist.is_initialized()
    if left:
        dist.destroy_process_group()
    assert not left


@pytest.mark.versions
def test_plan(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(f"plan --recipe {tiny_recipe} --processes 2 4 --strategies ddp fsdp", capsys)
    for strategy in ("ddp", "fsdp"):
        for processes in (2, 4):
            where = f"{strategy}, {processes} processes: "
            assert rows(lines, where + "held in all") == 1
            (line,) = [line for line in lines if line.startswith(where + "moving average")]
            assert line.endswith("0 collectives")
    lines = run(f"plan --recipe {tiny_recipe} --processes 4 --strategies hsdp --shard 2", capsys)
    assert rows(lines, "hsdp, 4 processes in groups of 2: optimizer, all-reduce") == 1


@pytest.mark.versions
@pytest.mark.parametrize(("strategy", "spread"), [("ddp", 1), ("fsdp", 4), ("hsdp", 2)])
def test_plan_counts(strategy: Spreading, spread: int, tiny_recipe: Path) -> None:
    """One all-reduce for each norm and pass, one for the optimizer, none for the target."""
    recipe, processes, classes = load(str(tiny_recipe)), 4, 12
    online, target = byol.build(recipe.model, classes, recipe.seed)
    whole, target_whole = (
        4 * sum(p.numel() for p in network.parameters()) for network in (online, target)
    )
    norms, target_norms = (
        [len(m.weight) for m in network.modules() if isinstance(m, BatchNorm)]
        for network in (online, target)
    )
    tensors = len(list(online.parameters()))
    units = 1 + len(online.encoder.blocks())  # that parameters are gathered for

    found = need(recipe, strategy, processes, shard=2, classes=classes)

    assert found.state == {  # every tensor's rows divide by 4
        "parameters": whole // spread,
        "gradients": whole // spread,
        "optimizer": whole // spread,
        "target's parameters": target_whole // spread,
    }
    shared = "norms' all-reduce"
    traffic = dict(found.traffic)
    # Two sums of each view and channel, in float64 and with a count, or in float32.
    for part, expected in (
        ("online forward", Traffic(len(norms), sum(8 * 2 * (2 * n + 1) for n in norms))),
        ("target forward", Traffic(len(target_norms), sum(16 * (2 * n + 1) for n in target_norms))),
        ("backward", Traffic(len(norms), sum(4 * 2 * 2 * n for n in norms))),
    ):
        assert traffic.pop(Entry(part, shared, processes)) == expected
    if strategy == "ddp":
        [(entry, reduced)] = traffic.items()
        assert entry == Entry("backward", "all-reduce", processes)
        assert reduced.bytes == whole
        return
    gathered = traffic.pop(Entry("online forward", "all-gather", spread))
    assert gathered == Traffic(units, whole // spread)
    gathered = traffic.pop(Entry("target forward", "all-gather", spread))
    assert gathered == Traffic(units, target_whole // spread)
    # What is outermost is kept since the forward.
    assert traffic.pop(Entry("backward", "all-gather", spread)).collectives == units - 1
    assert traffic.pop(Entry("backward", "reduce-scatter", spread)) == Traffic(units, whole)
    assert traffic.pop(Entry("optimizer", "all-reduce", spread)) == Traffic(1, 8 * 2 * tensors)
    if strategy == "hsdp":
        replicas = traffic.pop(Entry("backward", "all-reduce", processes // spread))
        assert replicas == Traffic(units, whole // spread)
    assert not traffic


@pytest.mark.versions
def test_plan_leaves_no_process_group_when_it_fails(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert dist.get_world_size() == 4
        raise RuntimeError("planned")

    monkeypatch.setattr("launch.benchmarks.plan.byol.build", fail)
    with pytest.raises(RuntimeError, match="planned"):
        need(load(str(tiny_recipe)), "ddp", 4, shard=2, classes=12)
    assert not dist.is_initialized()
