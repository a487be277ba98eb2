"""A step on a GPU that is not there: torch's fake tensors have its device and no values.

Torch refuses to compute with a fake tensor of a GPU and one of the CPU, as a GPU does, and to tell
a value to the host, for which a step on a GPU would have to wait. Autograd cannot go backwards
without the driver, so gradients of the right shapes take the place of the backward pass.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.data import open_data, train_batches
from engine.log.terminal import Terminal
from engine.method import byol
from engine.method.adamw import AdamWConfig
from engine.method.average import AverageConfig
from engine.method.clipping import ClipConfig
from engine.method.lars import LARSConfig
from engine.method.sgd import SGDConfig
from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.processes.world import World
from engine.recipe import Recipe
from engine.run import open_run
from engine.trainer import Trainer
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.views import COLUMNS
from tests.helpers import tiny

pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore:CUDA is not available"),  # autocast's, which is then off
]

GPU = torch.device("cuda", 0)


@contextlib.contextmanager
def on_a_gpu(recipe: Recipe, patch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    """Yield a trainer whose tensors lie on a fake GPU, within the mode that makes them."""
    build = byol.build

    def build_real(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return build(*arguments)

    def backward(loss: Tensor) -> None:
        assert loss.device == GPU
        for parameter in trainer.online.parameters():
            parameter.grad = torch.empty_like(parameter)

    def nothing(*_: Any, **__: Any) -> None: ...

    patch.setattr(byol, "build", build_real)
    patch.setattr(torch.cuda, "get_device_name", lambda _: "fake")
    patch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**36)
    )
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("Stream", "current_stream"):  # streams are the driver's
        patch.setattr(torch.cuda, name, lambda _: SimpleNamespace(wait_stream=nothing))
    patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    patch.setattr(Tensor, "record_stream", nothing)
    patch.setattr(Tensor, "backward", backward)
    for name in ("_fused_sgd_", "_amp_update_scale_"):  # they have no form for fake tensors
        patch.setattr(torch, name, nothing)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    world, terminal = World(0, 1, 1, GPU), Terminal(False)
    data = open_data(recipe, world, terminal.say)
    run = open_run(recipe, data.train.digest, world, terminal)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            trainer = Trainer(recipe, world, data, run)
            yield trainer
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp16"},
        {"precision": "bf16", "optimizer": AdamWConfig(), "clip": ClipConfig(norm=1.0)},
        {"optimizer": TorchOptimizerConfig("RMSprop", adapt=True), "clip": ClipConfig(value=1.0)},
    ],
    ids=["lars", "adamw", "rmsprop"],
)
def test_a_step_stays_on_the_device(
    changes: dict[str, Any], tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(
        tiny.recipe(tiny_data, tmp_path, probe=tiny.NO_PROBE),
        batch=BatchConfig(size=16, micro=2),
        average=AverageConfig(rate=0.9),
        **changes,
    )
    with on_a_gpu(recipe, monkeypatch) as trainer:
        host = replace(trainer.world, device=torch.device("cpu"))  # which pins no memory
        loader = train_batches(
            recipe, trainer.data.order, host, start=0, threads=1, report=lambda _: None
        )
        with contextlib.closing(loader) as batches:
            output = [trainer.train_step(next(batches)) for _ in range(2)][-1]
        assert output.images.is_contiguous(memory_format=torch.channels_last)
        for tensor in output[:6]:
            assert isinstance(tensor, Tensor)
            assert tensor.device == GPU


@pytest.mark.parametrize("optimizer", [LARSConfig(), AdamWConfig(), SGDConfig()], ids=str)
def test_an_update_takes_nothing_from_the_host(
    optimizer: Any, tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph would go on with what the host had when it was recorded."""
    recipe = replace(
        tiny.recipe(tiny_data, tmp_path, probe=tiny.NO_PROBE),
        batch=BatchConfig(size=16, micro=2),
        average=AverageConfig(rate=0.9),
        optimizer=optimizer,
        precision="fp16",
    )
    with on_a_gpu(recipe, monkeypatch) as trainer:
        views = torch.zeros(2, 16, 3, 32, 32, dtype=torch.uint8, device=GPU)
        params = torch.zeros(2, 16, COLUMNS, device=GPU)
        rates = [torch.zeros((), device=GPU) for _ in range(3)]
        with OnTheDevice():
            trainer.update(views, params, torch.zeros(16, dtype=torch.int64, device=GPU), *rates)


class OnTheDevice(TorchDispatchMode):
    """Refuses operations with a tensor of the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = None
        if func is not torch.ops.aten._fused_adamw_.tensor_lr:  # fake tensors lack it
            found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves([args, kwargs, found]):
            assert not isinstance(tensor, Tensor) or tensor.device == GPU, func
        return found
