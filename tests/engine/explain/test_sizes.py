"""Bytes and operations of a step on fake tensors, beside torch's own profile of a real step."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from engine.explain import memory
from engine.explain.sizes import Fakes, LiveBytes, count
from engine.method import byol
from engine.method.adamw import AdamWConfig
from engine.method.average import AverageConfig
from engine.method.byol import VIEWS, BYOLConfig, byol_loss
from engine.method.precision import Precision, autocast
from engine.method.resnet import ResNetConfig
from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.processes import parallel
from engine.processes.world import World
from engine.recipe import Recipe
from engine.state import checkpoint
from launch.benchmarks import plan as bench_plan
from shards.loader import DataConfig
from shards.views import ViewsConfig
from tests.helpers import tiny
from tests.helpers.training import finish, training

pytestmark = pytest.mark.versions

OPTIMIZERS = [
    *(tiny.recipe(DataConfig(), "").optimizer, AdamWConfig()),
    TorchOptimizerConfig("NAdam", adapt=True),
]
CLASSES, ROWS = 8, 8
MARK = 12_345  # bytes of a tensor that marks a moment in the profile
BASIC = BYOLConfig(
    encoder=ResNetConfig(depth=10, width=0.25, stem="cifar"), hidden=256, projection=64
)
BOTTLENECK = BYOLConfig(encoder=ResNetConfig(depth=50, width=0.125), hidden=64, projection=32)


def measured(recipe: Recipe, recompute: bool) -> tuple[int, int]:
    """Profile a real step: the bytes after the online network's forward pass, and at the peak."""
    online, target = byol.build(recipe.model, CLASSES, seed=0)
    world = World(0, 1, 1, torch.device("cpu"))
    config = parallel.ParallelConfig(recompute=recompute)
    spread = parallel.parallelize(
        *(online, target, config, "none", world), compile=False, static=True
    )
    for parameter in online.parameters():
        parameter.grad = torch.zeros_like(parameter)
    size = recipe.views.size
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        images = torch.rand(VIEWS * ROWS, 3, size, size)
        with autocast(recipe.precision, world.device):
            with torch.no_grad():
                projection = target(images)
            output = spread.online(images)
            torch.empty(MARK, dtype=torch.uint8)
        assert output.logits is not None
        labels = torch.zeros(ROWS, dtype=torch.int64)
        loss = byol_loss(output.prediction, projection).mean()
        (loss + F.cross_entropy(output.logits.float(), labels)).backward()
    now, most, kept = 0, 0, -1
    results: Any = profiled.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            kept = now if event.nbytes() == MARK else kept
            now += event.nbytes()
            most = max(most, now)
    return kept, most


@pytest.mark.parametrize(
    ("model", "recompute", "precision"),
    [
        (BASIC, False, "fp32"),
        (BASIC, False, "bf16"),
        (BASIC, True, "fp32"),
        (BOTTLENECK, True, "bf16"),
    ],
)
def test_bytes_of_a_step(model: BYOLConfig, recompute: bool, precision: Precision) -> None:
    recipe = Recipe(model=model, views=ViewsConfig(size=32), precision=precision)
    found = Fakes(recipe, CLASSES).measure_step(ROWS, recompute=recompute)
    kept, most = measured(recipe, recompute)
    assert found.kept == pytest.approx(kept, rel=0.01)
    # At the peak, a convolution's backward pass has a copy of its weight in another order, which is
    # the kernel's own.
    own = max(p.numel() for p in byol.Online(model, CLASSES).parameters()) * 4
    assert 0.99 * most - own <= found.peak <= 1.01 * most


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, TorchOptimizerConfig("Adadelta")])
def test_bytes_of_an_update(optimizer: Any) -> None:
    """By torch's profile of a real step of the optimizer, which works on all tensors at once."""
    recipe = Recipe(model=BASIC, optimizer=optimizer, views=ViewsConfig(size=32))
    online, target = byol.build(recipe.model, CLASSES, seed=0)
    made = optimizer.build(online)
    for group in made.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = True
    for parameter in online.parameters():
        parameter.grad = torch.ones_like(parameter)
    moves = byol.pair_parameters(target, online)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        made.step(None, recipe.clip)
        with torch.no_grad():
            byol.update_target(*moves, torch.ones(()))
    now, most = 0, 0
    results: Any = profiled.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert memory.hold(Fakes(recipe, CLASSES), 1).update == pytest.approx(most, rel=0.05)


def test_operations_of_a_step() -> None:
    """Each layer's products, counted from the shapes of a real forward pass."""
    recipe = Recipe(model=BASIC, views=ViewsConfig(size=32))
    online, target = byol.build(recipe.model, CLASSES, seed=0)
    total = 0

    def note(passes: int, layer: nn.Module, _: tuple[Tensor], made: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        total += 2 * made.numel() * layer.weight[0].numel() * passes

    for network, passes in ((online, 3), (target, 1)):  # forward, and two gradients
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                first = passes == 3 and name in ("encoder.conv1", "classifier")  # inputs need none
                hook = lambda *a, n=passes - first: note(n, *a)  # noqa: E731
                layer.register_forward_hook(hook)
        network(torch.rand(VIEWS * ROWS, 3, 32, 32))
    found = Fakes(recipe, CLASSES).measure_step(ROWS, recompute=False)
    assert found.operations == pytest.approx(total, rel=0.005)  # biases count too, a little


def test_live_bytes_follow_real_tensors() -> None:
    known = torch.empty(1000)
    with LiveBytes([known]) as live:
        first = torch.empty(10)
        view = first[2:]
        known.add_(1)
        assert live.now == 40
        del first
        assert live.now == 40  # its view still holds the memory
        del view
    assert (live.now, live.peak) == (0, 40)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_is_as_large_as_said(
    tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory, optimizer: Any
) -> None:
    run = tmp_path_factory.mktemp("run")
    average = AverageConfig(rate=0.5)
    recipe = tiny.recipe(
        *(tiny_data, run), steps=1, probe=tiny.NO_PROBE, optimizer=optimizer, average=average
    )
    with training(recipe) as trainer:
        finish(trainer)
    fakes = Fakes(recipe, trainer.classes)
    leaves = [leaf for leaf in tree_leaves(trainer.state()) if isinstance(leaf, Tensor)]
    assert fakes.checkpoint == sum(leaf.nbytes for leaf in leaves)
    assert checkpoint.steps(str(run)) == [1]
    files = checkpoint.verify(checkpoint.step_url(str(run), 1), trainer.world).files
    written = sum(length for name, (length, _) in files.items() if name.endswith(".distcp"))
    assert fakes.checkpoint <= written <= fakes.checkpoint + 2000 * len(leaves)  # headers of each


def test_parameters_are_those_of_the_networks(tiny_data: DataConfig) -> None:
    recipe = tiny.recipe(tiny_data, "")
    networks = byol.build(recipe.model, CLASSES, recipe.seed)
    assert sum(Fakes(recipe, CLASSES).parts().values()) == sum(map(count, networks))
    wide = dataclasses.replace(recipe, precision="fp64")
    assert memory.hold(Fakes(wide, 0), 1).parameters == 8 * sum(
        p.numel() for p in byol.build(recipe.model, 0, 0)[0].parameters()
    )


@pytest.mark.parametrize(("strategy", "shards"), [("ddp", 1), ("fsdp", 6), ("hsdp", 3)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_a_process_holds(strategy: Any, shards: int, optimizer: Any) -> None:
    """Beside the parts that torch's own sharding gives to the first of six processes."""
    recipe = tiny.recipe(DataConfig(streams=8), "", optimizer=optimizer)
    state = bench_plan.need(recipe, strategy, 6, 3, CLASSES).state
    fakes = Fakes(recipe, CLASSES)
    held = memory.hold(fakes, shards)
    assert held.parameters == state["parameters"]
    assert held.gradients == state["gradients"]
    assert held.optimizer == state["optimizer"]
    assert held.target - fakes.buffers == state["target's parameters"]
    assert (held.gathered > 0) == (shards > 1)
    assert held.average == 0
    averages = dataclasses.replace(recipe, average=AverageConfig(rate=0.5))
    more = memory.hold(Fakes(averages, CLASSES), shards)
    encoder = fakes.online.encoder
    whole = sum(p.nbytes for p in encoder.parameters())
    norms = 4 * sum(b.numel() for n, b in encoder.named_buffers() if "running" in n)
    assert more.average - norms == (whole if shards == 1 else pytest.approx(whole / shards, 0.1))
    assert more.state - held.state == more.average


def test_strategies_that_fit() -> None:
    assert memory.strategies(1, 8) == {"none": 1}
    assert memory.strategies(8, 8) == {"ddp": 1, "fsdp": 8}
    assert memory.strategies(64, 8) == {"ddp": 1, "fsdp": 64, "hsdp": 8}
    assert memory.strategies(12, 8) == {"ddp": 1, "fsdp": 12}
