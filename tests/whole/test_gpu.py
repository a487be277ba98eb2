"""What only a GPU can show; skipped, and said so, without one."""

import contextlib
import io
import math
import threading
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from engine.log.metrics import LogConfig
from engine.method.adamw import AdamWConfig
from engine.method.average import AverageConfig
from engine.method.clipping import ClipConfig
from engine.method.lars import LARSConfig
from engine.method.local_shards import local
from engine.method.norm import BatchNorm, synchronize
from engine.method.sgd import SGDConfig
from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.method.torch_options import ELEMENTWISE
from engine.processes import compiling, world
from engine.processes.copies import Copies
from engine.processes.parallel import ParallelConfig
from engine.state.saver import Saver
from engine.trainer import Trainer
from shards import device_crops
from shards.decode import crop_resize, decode
from shards.index import Index
from shards.loader import Assignment, Batch, DataConfig, TrainLoader
from shards.order import BatchConfig, Order
from shards.views import ViewsConfig
from tests.conftest import draw_photo
from tests.engine.processes.test_step_graph import float32_rates
from tests.engine.test_trainer import comparable, train
from tests.helpers import tiny
from tests.helpers.training import open_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def nccl() -> Iterator[world.World]:
    """One process in a group of its own."""
    yield world.join(None, distributed=True)
    world.leave()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_equal_runs_are_equal_bit_for_bit(
    tiny_data: DataConfig, tmp_path: Path, precision: str
) -> None:
    for name in ("a", "b"):
        recipe = tiny.recipe(tiny_data, tmp_path / name, precision=precision, steps=8, compile=True)
        train(recipe)
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("compile", [False, True])
def test_one_rank_of_nccl_is_one_process(
    tiny_data: DataConfig, tmp_path: Path, strategy: Any, compile: bool
) -> None:
    train(tiny.recipe(tiny_data, tmp_path / "alone", steps=3, probe=tiny.NO_PROBE))
    parallel = ParallelConfig(strategy=strategy)
    try:
        train(
            tiny.recipe(
                tiny_data,
                tmp_path / "nccl",
                steps=3,
                probe=tiny.NO_PROBE,
                parallel=parallel,
                compile=compile,
            )
        )
    finally:
        world.leave()
    for ours, alone in zip(
        comparable(tmp_path / "nccl"), comparable(tmp_path / "alone"), strict=True
    ):
        assert ours["data_digest"] == alone["data_digest"]
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-2)


@pytest.mark.parametrize(
    "config",
    [
        *(LARSConfig(), AdamWConfig(), SGDConfig()),
        *(TorchOptimizerConfig(name, weight_decay=0.0) for name in sorted(ELEMENTWISE)),
        TorchOptimizerConfig("RMSprop", adapt=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("clip", [ClipConfig(), ClipConfig(norm=0.5, value=0.1)], ids=str)
def test_an_optimizer_never_waits_for_the_device(config: Any, clip: ClipConfig) -> None:
    """Its steps are those on a CPU, and a step that is not finite changes nothing."""
    torch.manual_seed(0)
    there = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(7, 5))
    here = deepcopy(there).cuda()
    optimizers = [config.build(there), config.build(here)]
    parameters = list(here.parameters())

    def step(fault: float) -> list[Any]:
        for p, q in zip(there.parameters(), parameters, strict=True):
            p.grad = torch.randn_like(p)
            p.grad.view(-1)[0] += fault
            q.grad = p.grad.cuda()
        for group in [group for one in optimizers for group in one.param_groups]:
            group["lr"] = 0.01
        optimizers[0].step(clip=clip)
        torch.cuda.set_sync_debug_mode("error")
        try:
            skip = optimizers[1].step(clip=clip)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert skip == (fault != 0)
        # Adagrad of torch 2.11 counts its steps on the host, which does not know of a skip.
        states = [optimizers[1].state[p].items() for p in parameters]
        there_alone = [{key: value for key, value in one if value.is_cuda} for one in states]
        return deepcopy([parameters, there_alone])

    for _ in range(3):
        before = step(0.0)
    torch.testing.assert_close(step(math.nan), before, rtol=0, atol=0)
    step(0.0)
    for p, q in zip(there.parameters(), parameters, strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3])
def test_norm_is_as_close_to_float64_as_torchs(nccl: world.World, offset: float) -> None:
    group: Any = dist.group.WORLD
    torch.manual_seed(0)
    x = offset + torch.randn(64, 16, 8, 8, device=nccl.device)
    ours = BatchNorm(16, views=1).to(nccl.device)
    synchronize(ours, group)
    compiled = BatchNorm(16, views=1).to(nccl.device)  # with several processes or one
    compiled.forward = compiling.compiled(compiled.forward)  # type: ignore[method-assign]
    torchs = nn.SyncBatchNorm(16, process_group=group).to(nccl.device)
    exact = nn.BatchNorm2d(16).to(nccl.device, torch.float64)
    upstream = torch.randn_like(x)
    errors = {}
    expected = x.double().requires_grad_()
    y = exact(expected)
    y.backward(upstream.double())
    assert expected.grad is not None
    for name, norm in (("ours", ours), ("compiled", compiled), ("torchs", torchs)):
        mine = x.clone().requires_grad_()
        found = norm(mine)
        found.backward(upstream)
        assert mine.grad is not None
        errors[name] = [
            ((a.double() - b).norm() / b.norm()).item()
            for a, b in ((found, y), (mine.grad, expected.grad))
        ]
    print(errors)
    for side, most in (("ours", 1.1), ("compiled", 4.0)):  # a compiler adds in another order
        for our_error, torchs_error in zip(errors[side], errors["torchs"], strict=True):
            assert our_error <= most * torchs_error + 1e-7


def test_images_and_features_are_channels_last(tiny_data: DataConfig, tmp_path: Path) -> None:
    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path))
    shapes = []

    def look(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        for tensor in (*inputs, output):
            shapes.append(tensor.is_contiguous(memory_format=torch.channels_last))

    trainer.online.encoder.get_submodule("conv1").register_forward_hook(look)
    trainer.online.encoder.get_submodule("bn1").register_forward_hook(look)
    with contextlib.closing(trainer.batches()) as batches:
        output = trainer.train_step(next(batches))
    assert output.images.is_contiguous(memory_format=torch.channels_last)
    assert shapes
    assert all(shapes)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_background_save_is_of_one_step(
    tiny_data: DataConfig, tmp_path: Path, strategy: Any
) -> None:
    """Copied to pinned memory while the device goes on."""
    recipe = tiny.recipe(tiny_data, tmp_path, parallel=ParallelConfig(strategy))
    trainer = open_trainer(recipe)
    go_on, same = threading.Event(), []
    with (
        contextlib.closing(trainer.batches()) as batches,
        Saver(trainer.world, True, print) as saves,
    ):
        for _ in range(2):  # the second one fills the same buffers
            trainer.train_step(next(batches))
            expected = [t.cpu() for t in local(tree_leaves(trainer.state()))]

            def write(state: dict[str, Any], _: world.World, expected: Any = expected) -> None:
                go_on.wait(60)
                found = local(tree_leaves(state))
                same.append(all(map(torch.equal, found, expected)))
                assert all(t.is_pinned() for t in found if t.numel() > 1)

            go_on.clear()
            saves.save(1, trainer.state(), write)
            trainer.train_step(next(batches))
            torch.cuda.synchronize()
            go_on.set()
            assert saves.wait()
    assert same == [True, True]
    world.leave()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(
    tiny_data: DataConfig, tmp_path: Path, precision: str
) -> None:
    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, precision=precision))
    with contextlib.closing(trainer.batches()) as batches:
        trainer.train_step(next(batches))
        batch = next(batches)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.train_step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "changes",
    [
        *({"precision": precision} for precision in ("fp32", "bf16", "fp16")),
        *({"precision": precision, "compile": True} for precision in ("fp32", "bf16", "fp16")),
        {"optimizer": SGDConfig(), "clip": ClipConfig(norm=0.5, value=0.1)},
        {
            "optimizer": AdamWConfig(),
            "batch": BatchConfig(size=16, micro=2),
            "average": AverageConfig(rate=0.9),
            "parallel": ParallelConfig(recompute=True),
        },
    ],
    ids=str,
)
def test_steps_by_a_graph_are_ordinary_steps(
    changes: dict[str, Any], tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_rates", float32_rates)
    recipe = tiny.recipe(tiny_data, tmp_path, probe=tiny.NO_PROBE, **changes)
    ordinary, by_graph = open_trainer(recipe), open_trainer(replace(recipe, cuda_graph=True))
    assert by_graph.graph is not None
    with (
        contextlib.closing(ordinary.batches()) as ours,
        contextlib.closing(by_graph.batches()) as theirs,
    ):
        for step in range(12):
            by_graph.graph.active = step != 8  # graphs and ordinary steps may take turns
            expected = ordinary.train_step(next(ours))
            found = by_graph.train_step(next(theirs))
            assert all(map(torch.equal, found[:6], expected[:6])), step
            assert all(map(torch.equal, by_graph._changed(), ordinary._changed())), step
    assert by_graph.graph.memory > 0


def test_a_run_by_a_graph_is_evaluated_and_saved(tiny_data: DataConfig, tmp_path: Path) -> None:
    """It is an ordinary run, but for the rates, which a graph rounds to float32."""
    log = LogConfig(every=4)
    train(tiny.recipe(tiny_data, tmp_path / "ordinary", log=log))
    by_graph = train(tiny.recipe(tiny_data, tmp_path / "graph", log=log, cuda_graph=True))
    assert by_graph.graph is not None
    assert by_graph.graph.memory > 0
    for ours, theirs in zip(
        comparable(tmp_path / "graph"), comparable(tmp_path / "ordinary"), strict=True
    ):
        assert ours["data_digest"] == theirs["data_digest"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    again = open_trainer(tiny.recipe(tiny_data, tmp_path / "graph", log=log))
    assert again.step == 20
    assert all(map(torch.equal, *(tree_leaves(one.state()) for one in (again, by_graph))))


def test_a_batch_is_copied_while_kernels_run() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    copies, kernels = Copies(device), torch.cuda.current_stream(device)
    batch = torch.ones(1 << 24, dtype=torch.uint8, pin_memory=True)
    for length in (1_000_000, 1_000_000_000):  # the first round prepares the memory
        torch.cuda.synchronize()
        torch.cuda._sleep(length)
        (there,) = copies.take(batch)
        assert copies.stream is not None
        copies.stream.synchronize()
    assert not kernels.query()  # it is still in its sleep
    assert there.sum() == 1 << 24


def test_a_copy_never_harms_the_batch_before() -> None:
    """The memory of a batch is given to the next one when the last kernel has read it."""
    device = torch.device("cuda", torch.cuda.current_device())
    copies, sums = Copies(device), list[Tensor]()
    for number in range(20):
        (there,) = copies.take(torch.full((1 << 20,), number, pin_memory=True))
        torch.cuda._sleep(10_000_000)
        sums.append(there.sum())
        del there
    assert [int(value) >> 20 for value in sums] == list(range(20))


# Decoding ----------------------------------------------------------------------------------


def test_crops_are_those_of_the_cpu() -> None:
    """From equal pixels, of noise: the kernels round alike."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator().manual_seed(0)
    for height, width in ((300, 400), (90, 70), (7, 5), (1, 1)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        for size in (16, 96, 224):
            box = (height // 4, width // 5, height - height // 4, width - width // 5)
            ours = device_crops.resize_on_device(image.to(device), box, size).cpu()
            off = (ours.int() - crop_resize(image, box, size).int()).abs()
            assert off.max() <= 2
            assert (off > 0).float().mean() < 0.02


@pytest.mark.parametrize("form", ["baseline", "progressive", "gray"])
def test_nvjpeg_decodes_the_same_picture(form: str) -> None:
    """Smooth pictures at full color resolution, in which only the rounding can differ."""
    device = torch.device("cuda", torch.cuda.current_device())
    device_crops.check_device(device)
    mode = "L" if form == "gray" else "RGB"
    picture = Image.open(io.BytesIO(draw_photo(0, 320, 240, "PNG"))).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0, progressive=form == "progressive")
    content = bytearray(buffer.getvalue())
    (ours,) = device_crops.decode_on_device([torch.frombuffer(content, dtype=torch.uint8)], device)
    off = (ours.cpu().int() - decode(content, 0, len(content)).int()).abs()
    assert off.float().mean() < 1
    assert off.max() <= 8


def test_batches_are_those_of_the_cpu(packed: Index) -> None:
    """While the default stream is busy and frees memory that the decoder could be given."""
    device = torch.device("cuda", torch.cuda.current_device())
    order = Order(packed, 3, 4, 16)
    told: list[str] = []

    def load(config: DataConfig) -> list[Batch]:
        assignment = Assignment(order, range(4), ViewsConfig(size=64), config, 4)
        loader = TrainLoader(assignment, told.append, pin_memory=True, device=device)
        with contextlib.closing(loader):
            return [next(loader) for _ in range(3 * order.steps_per_epoch)]

    cpus, sums = load(DataConfig()), []
    for _ in range(50):
        torch.cuda._sleep(10_000_000)
        sums.append(torch.ones(1 << 20, device=device).sum())  # freed while it is still summed
    ours = load(DataConfig(decode="gpu"))
    assert [value.item() for value in sums] == [1 << 20] * 50
    assert told == []
    for mine, theirs in zip(ours, cpus, strict=True):
        assert (mine.ids == theirs.ids).all()
        assert torch.equal(mine.params, theirs.params)
        off = (mine.views.int() - theirs.views.int()).abs().float().mean((2, 3, 4))  # [V, B]
        # These photos have colors at half the resolution. A decoder that repeats them, where the
        # CPU's interpolates, is off by up to 6. Another photo is off by 39 or more.
        assert off.max() < 15


def test_a_run_that_decodes_on_the_gpu(packed: Index, tmp_path: Path) -> None:
    """It is the run of the CPU up to rounding, and equal to itself bit for bit."""
    for name, decoder in (("cpu", "cpu"), ("a", "gpu"), ("b", "gpu")):
        data = DataConfig(train=packed.url, streams=4, decode=decoder)  # type: ignore[arg-type]
        train(tiny.recipe(data, tmp_path / name, steps=4, probe=tiny.NO_PROBE))
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")
    for ours, cpus in zip(comparable(tmp_path / "a"), comparable(tmp_path / "cpu"), strict=True):
        assert ours["data_digest"] == cpus["data_digest"]
        assert ours["loss"] == pytest.approx(cpus["loss"], rel=0.1)
