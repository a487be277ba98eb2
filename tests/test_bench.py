"""The benches run and say how the sides compare; what stock computes is what ours computes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.byol import BYOLConfig
from engine.recipe import Recipe
from engine.resnet import ResNetConfig
from engine.schedule import ScheduleConfig
from launch import bench
from launch.benchmarks.input import draw_photo
from launch.benchmarks.order import VISITS, Setting, write_data_set
from launch.benchmarks.step import Stock, prepare
from shards.index import Index
from shards.order import BatchConfig
from shards.views import ViewsConfig

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.py"


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that the command prints."""
    assert bench.main(command.split()) == 0
    return capsys.readouterr().out.splitlines()


def rows(lines: list[str], start: str) -> int:
    return sum(line.startswith(start) for line in lines)


def test_input_on_drawn_photos(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.benchmarks.input.PHOTOS", 12)
    options = "--size 32 --images 10 --batch 5 --rounds 2 --threads 1"
    lines = run(f"input {options}", capsys)
    assert rows(lines, "ours / stock, host work with a GPU") == 1
    assert rows(lines, "ours / stock, all on the CPU") == (not torch.cuda.is_available())


def test_photos_are_of_the_usual_size() -> None:
    assert 90_000 < len(draw_photo(0)) < 120_000


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
        assert rows(run(f"input --data {data} {options}", capsys), "ours / stock") >= 1
    assert sorted(folder.iterdir()) == before  # nothing is written next to the user's data


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("input --data NONE/such", "no such file or folder"),
        ("input --data memory://bench/tars", "pack.py --index-only"),
        ("input --data tests", "no tars there"),
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
    assert rows(lines, "ours / stock, 500 samples") == 1


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


@pytest.mark.parametrize("recipe", ["", f"--recipe {QUICKSTART}"])  # LARS, AdamW
def test_step(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--batch 8 --steps 1 --rounds 2 --threads 1 --no-compile --precision fp32"
    lines = run(f"step {recipe} {options} --peak-tflops 1", capsys)
    for row in ("ours / stock", "peak memory: ours", "model FLOPs utilisation"):
        assert rows(lines, row) == 1


@pytest.mark.parametrize(
    "encoder",  # the first is torchvision's
    [ResNetConfig(depth=18), ResNetConfig(depth=50, width=0.125, stem="cifar")],
)
def test_stock_takes_the_same_step(encoder: ResNetConfig, tmp_path: Path) -> None:
    recipe = Recipe(
        threads=1,
        compile=False,
        batch=BatchConfig(8),
        model=BYOLConfig(encoder, hidden=32, projection=16),
        views=ViewsConfig(size=32),
        schedule=ScheduleConfig(epochs=20, warmup_epochs=2, base_lr=4.0),
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
