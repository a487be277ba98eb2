"""Batch norm over several processes, and what of a step travels between them."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from engine.method import norm as norm_module
from engine.method.byol import BYOLConfig, build
from engine.method.norm import BatchNorm, RunningStatistics, synchronize
from engine.method.resnet import ResNetConfig
from engine.processes import compiling, world
from engine.processes.parallel import ParallelConfig, parallelize
from engine.recipe import Recipe
from shards.errors import InputError
from shards.loader import DataConfig
from tests.helpers.ranks import Ranks
from tests.helpers.training import open_trainer
from tests.whole import parity

pytestmark = pytest.mark.versions

ROWS = (5, 3, 8)  # of three ranks, in each view
CHANNELS = 6


def draw(dtype: torch.dtype, offset: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of all ranks [2, 16, C, 4, 4], upstream gradients, weight and bias, in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, sum(ROWS), CHANNELS, 4, 4)
    x = offset + torch.randn(shape, generator=generator)
    upstream = torch.randn(shape, generator=generator)
    weight, bias = torch.randn(2, CHANNELS, generator=generator)
    return x.to(dtype), upstream.to(dtype), weight.to(dtype), bias.to(dtype)


def part(values: Tensor, rank: int) -> Tensor:
    """A rank's rows of [V, B, ...], views stacked: [V*b, ...]."""
    rows: Tensor = values.split(ROWS, dim=1)[rank]
    return rows.flatten(0, 1)


def normalize(dtype: torch.dtype, offset: float) -> dict[str, Tensor]:
    """On a rank: output, gradients and running statistics of our norm."""
    there = world.join(1, distributed=True)
    norm = BatchNorm(CHANNELS, views=2).to(dtype)
    synchronize(norm, dist.group.WORLD)  # type: ignore[arg-type]
    x, upstream, weight, bias = draw(dtype, offset)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    rows = part(x, there.rank).requires_grad_()
    y = norm(rows)
    y.backward(part(upstream, there.rank))
    statistics = RunningStatistics([norm])
    statistics.note()
    statistics.apply()
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    assert rows.grad is not None
    found = {"y": y.detach(), "dx": rows.grad}
    found |= {
        "dweight": there.all_reduce(norm.weight.grad),
        "dbias": there.all_reduce(norm.bias.grad),
    }
    return found | {"mean": norm.running_mean, "variance": norm.running_var}


def exact(dtype: torch.dtype, offset: float) -> dict[str, Tensor]:
    """The same by torch's own norm on all rows at once, in float64, one view after the other.

    `dtype`: which the rows were rounded to before.
    """
    x, upstream, weight, bias = (tensor.double() for tensor in draw(dtype, offset))
    norm = nn.BatchNorm2d(CHANNELS).double()
    norm.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    x.requires_grad_()
    y = torch.stack([norm(view) for view in x])
    y.backward(upstream)
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    found = {"y": y.detach(), "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    return found | {"mean": norm.running_mean, "variance": norm.running_var}


def as_torch_does(offset: float) -> Tensor:
    """Output of torch.nn.SyncBatchNorm's way in float32, which itself runs on GPUs only.

    Every rank has a mean and an inverse deviation; they are merged, rank by rank, in float32.
    """
    x, _, weight, bias = draw(torch.float32, offset)
    views = []
    for view in x:
        mean, square, count = torch.zeros(CHANNELS), torch.zeros(CHANNELS), 0
        for rows in view.split(ROWS):
            n = rows[:, 0].numel()
            variance, local_mean = torch.var_mean(rows, (0, 2, 3), correction=0)
            inverse = (variance + 1e-5).rsqrt()
            variance = 1 / inverse.square() - 1e-5
            delta = local_mean - mean
            square = square + variance * n + delta.square() * (count * n / (count + n))
            mean = (count * mean + n * local_mean) / (count + n)
            count += n
        inverse = (square / count + 1e-5).rsqrt()
        shape = (1, -1, 1, 1)
        y = (view - mean.view(shape)) * inverse.view(shape) * weight.view(shape)
        views.append(y + bias.view(shape))
    return torch.stack(views)


def assemble(outcomes: list[dict[str, Tensor]], key: str) -> Tensor:
    """[V, all rows, ...] from the ranks' [V*b, ...]."""
    return torch.cat([outcome[key].unflatten(0, (2, -1)) for outcome in outcomes], dim=1)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_uneven_ranks_are_exact(ranks: Ranks, offset: float) -> None:
    outcomes = ranks.run(normalize, torch.float64, offset, size=3)
    expected = exact(torch.float64, offset)
    for key in ("y", "dx"):
        torch.testing.assert_close(
            assemble(outcomes, key), expected[key], rtol=1e-8, atol=1e-8 * (1 + offset / 10)
        )
    for outcome in outcomes:  # the same on all ranks
        for key in ("dweight", "dbias", "mean", "variance"):
            torch.testing.assert_close(outcome[key], expected[key], rtol=1e-8, atol=1e-8)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3])
def test_float32_is_as_close_as_torchs(ranks: Ranks, offset: float) -> None:
    outcomes = ranks.run(normalize, torch.float32, offset, size=3)
    expected = exact(torch.float32, offset)
    ours = error(assemble(outcomes, "y"), expected["y"])
    torchs = error(as_torch_does(offset), expected["y"])
    print(f"offset {offset:g}: ours {ours:.2e}, torch's way {torchs:.2e}")
    assert ours <= 1.05 * torchs
    # Variance 1 about a mean of 1000, of which plain float32 sums would lose a fifth.
    assert error(outcomes[0]["variance"], expected["variance"]) < 1e-6
    for key in ("mean", "variance", "dweight"):
        for outcome in outcomes[1:]:
            assert torch.equal(outcome[key], outcomes[0][key]), key


# What travels -----------------------------------------------------------------------------------

SMALL = BYOLConfig(ResNetConfig(10, width=0.125, stem="cifar"), hidden=32, projection=16)


class Collectives(TorchDispatchMode):
    """Counts collectives by the name of their operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if "c10d" in namespace and "wait" not in name and "wrap" not in name:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(
    function: Callable[..., Any], into: dict[str, Counter[str]], name: str
) -> Iterator[Any]:
    """`function`, whose collectives are counted apart, under `name`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with Collectives() as mode:
            result = function(*args, **kwargs)
        into.setdefault(name, Counter()).update(mode.counts)
        return result

    yield call


def count_step(recipe: Recipe) -> tuple[dict[str, Counter[str]], int, int]:
    """On a rank: collectives of the parts of a step; the norms of online and target network."""
    trainer = open_trainer(recipe)
    trainer.step = 1
    found: dict[str, Counter[str]] = {}
    with closing(trainer.batches()) as batches:
        trainer.train_step(next(batches))  # DDP rearranges its buckets in the first
        batch = next(batches)
        with (
            counted(trainer.optimizer.step, found, "optimizer") as optimizer_step,
            counted(trainer.update_target, found, "average") as update_target,
            counted(trainer.target.forward, found, "target") as target_forward,
            counted(trainer.statistics.apply, found, "statistics") as apply,
        ):
            trainer.optimizer.step = optimizer_step  # type: ignore[method-assign]
            trainer.update_target = update_target
            trainer.target.forward = target_forward  # type: ignore[method-assign]
            trainer.statistics.apply = apply  # type: ignore[method-assign]
            with Collectives() as mode:
                trainer.train_step(batch)
    found["whole step"] = mode.counts
    norms = [
        sum(isinstance(module, BatchNorm) for module in network.modules())
        for network in (trainer.online, trainer.target)
    ]
    return found, norms[0], norms[1]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_collectives_of_a_step(
    ranks: Ranks,
    tiny_data: DataConfig,
    tmp_path: Any,
    strategy: Any,
    micro: int,
    recompute: bool,
) -> None:
    recipe = parity.recipe(
        tiny_data,
        str(tmp_path),
        micro=micro,
        parallel=ParallelConfig(strategy=strategy, recompute=recompute, timeout=60),
    )
    (found, online, target), _ = ranks.run(count_step, recipe, size=2)
    print({name: dict(counts) for name, counts in found.items()})
    whole = found["whole step"]
    assert found["target"]["all_reduce"] == micro * target
    assert whole["all_reduce"] == micro * (2 * online + target)
    assert found["average"] == Counter()
    assert found["statistics"] == Counter()
    if strategy == "ddp":
        assert found["optimizer"] == Counter()
        # One bucket of gradients, after the last micro-batch, and before that the labeled rows.
        assert whole["allreduce_"] == 2
    else:
        assert found["optimizer"] == Counter({"allreduce_": 1})
        assert whole["_reduce_scatter_base_"] == 4 + 1  # of every block, and of the rest


def graphs_of_online() -> tuple[int, list[int]]:
    """On a rank: graphs of the whole online network under DDP, and collectives in each.

    Forward and backward graphs, in this order.
    """
    there = world.join(1, distributed=True)
    online, target = build(SMALL, 10, seed=0)
    parallel = parallelize(
        online, target, ParallelConfig("ddp"), "ddp", there, compile=False, static=True
    )
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Any:
        targets = [str(node.target) for node in graph.graph.nodes]
        graphs.append(sum(name.startswith("_c10d_functional.all_reduce") for name in targets))
        return make_boxed_func(graph.forward)

    torch._dynamo.config.optimize_ddp = False
    wrapped = parallel.online
    assert isinstance(wrapped, DistributedDataParallel)
    online.forward = torch.compile(  # type: ignore[method-assign]
        online.forward,
        backend=aot_autograd(fw_compiler=count, bw_compiler=count),
        fullgraph=True,
    )
    output = wrapped(torch.randn(8, 3, 8, 8))
    output.prediction.square().mean().backward()
    norms = sum(isinstance(module, BatchNorm) for module in online.modules())
    return norms, graphs


def test_online_network_is_one_graph(ranks: Ranks) -> None:
    for norms, graphs in ranks.run(graphs_of_online, size=2):
        assert graphs == [norms, norms]


def check_norm_on_a_rank(fault: bool) -> str:
    """On a rank: what the check of the compiled norm says, with a `fault` in what is traced."""
    there = world.join(1, distributed=True)
    backward = norm_module._SyncNorm.backward

    def ignores_its_tangents(ctx: Any, dy: Tensor, *more: Tensor) -> Any:
        return backward(ctx, torch.ones_like(dy) if torch.compiler.is_compiling() else dy, *more)

    with pytest.MonkeyPatch.context() as patch:
        if fault:
            patch.setattr(norm_module._SyncNorm, "backward", staticmethod(ignores_its_tangents))
        try:
            compiling.check_norm(there, compiles=there.main)  # one machine may have no compiler
        except InputError as error:
            return str(error)
    return ""


def test_a_torch_that_compiles_the_norm_wrongly_is_refused(ranks: Ranks) -> None:
    assert ranks.run(check_norm_on_a_rank, False, size=2) == ["", ""]
    for told in ranks.run(check_norm_on_a_rank, True, size=2):
        assert f"torch {torch.__version__} computes wrong gradients" in told
        assert "--no-compile" in told
