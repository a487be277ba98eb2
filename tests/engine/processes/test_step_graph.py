"""A step as one CUDA graph, where a stand-in on the CPU records and replays."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.log import journal
from engine.log.metrics import LogConfig
from engine.method.adamw import AdamWConfig
from engine.method.average import AverageConfig
from engine.method.clipping import ClipConfig
from engine.method.lars import LARSConfig
from engine.method.sgd import SGDConfig
from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.processes import step_graph
from engine.processes.step_graph import WARM_UP, find_obstacle
from engine.trainer import Trainer
from shards.errors import InputError
from shards.loader import Batch, DataConfig
from shards.order import BatchConfig
from tests.helpers import tiny
from tests.helpers.recorded_steps import Recorder
from tests.helpers.training import finish, open_trainer, training


def refuse(_: object) -> Any:
    """A recording that fails, whose end then fails too, as torch's does."""
    try:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
    finally:
        raise RuntimeError("operation failed due to a previous error during capture")


def float32_rates(trainer: Trainer) -> tuple[float, float, float]:
    """Rates that float32 holds without rounding, as in a graph."""
    step = trainer.step + 1
    return step / 8, step / 16, 1 - 2.0**-step


@pytest.fixture(autouse=True)
def _same_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_rates", float32_rates)


@contextlib.contextmanager
def batches(trainer: Trainer) -> Iterator[Iterator[Batch]]:
    with contextlib.closing(trainer.batches()) as loader:
        yield loader


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": LARSConfig(), "average": AverageConfig(rate=0.9)},
        {"optimizer": LARSConfig(), "clip": ClipConfig(norm=0.5, value=0.1)},
        {"optimizer": AdamWConfig(), "batch": BatchConfig(size=16, micro=2)},
        {"optimizer": SGDConfig(nesterov=True), "precision": "bf16"},
    ],
    ids=["lars", "clipped", "adamw", "sgd"],
)
def test_steps_by_a_graph_are_ordinary_steps(
    changes: dict[str, Any], tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path, probe=tiny.NO_PROBE, **changes)
    ordinary = open_trainer(recipe)
    recorder = Recorder(monkeypatch)
    by_graph = open_trainer(replace(recipe, cuda_graph=True))
    assert by_graph.graph is not None
    with batches(ordinary) as ours, batches(by_graph) as theirs:
        for step in range(10):
            by_graph.graph.active = step != 6
            expected = ordinary.train_step(next(ours))
            found = by_graph.train_step(next(theirs))
            assert found[6:] == expected[6:]  # the rates
            assert all(map(torch.equal, found[:6], expected[:6])), step
            assert all(map(torch.equal, by_graph._changed(), ordinary._changed())), step
    assert recorder.replays == 10 - WARM_UP - 1  # all but step 6


def test_logged_steps_are_ordinary(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are measured by hooks, which a graph does not call."""
    recipe = replace(tiny.recipe(tiny_data, tmp_path / "ordinary"), log=LogConfig(every=4))
    with training(recipe) as trainer:
        finish(trainer)
    recorder = Recorder(monkeypatch)
    with training(replace(recipe, run=str(tmp_path / "graph"), cuda_graph=True)) as trainer:
        finish(trainer)
    ordinary, by_graph = (
        [
            {key: row[key] for key in ("step", "loss", "grad_norm", "update_ratio", "data_digest")}
            for row in journal.read(str(tmp_path / name))
            if row["step"]
        ]
        for name in ("ordinary", "graph")
    )
    assert by_graph == ordinary
    logged = {row["step"] for row in ordinary}
    assert {1, 4, 5, 8, 10, 20} <= logged
    not_logged = set(range(1, 21)) - logged
    # The first steps are ordinary too.
    assert recorder.replays == len([step for step in not_logged if step > WARM_UP])


TOLD = {
    "refused": "operation not permitted when stream is capturing",
    "without inputs": "the recorded step makes another update than an ordinary one",
    "not deterministic": "equal steps of this network differ on this GPU, so a recorded one cannot "
    "be compared with them",
}


@pytest.mark.parametrize("fault", TOLD)
def test_a_recording_that_is_wrong_is_told_in_one_line(
    fault: str, tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorder(monkeypatch, fixed=fault == "without inputs")
    if fault == "refused":
        monkeypatch.setattr(step_graph, "record", refuse)
    recipe = tiny.recipe(tiny_data, tmp_path, probe=tiny.NO_PROBE, cuda_graph=True)
    trainer = open_trainer(recipe)
    assert trainer.graph is not None
    trainer.graph.active = True
    with batches(trainer) as data:
        for _ in range(WARM_UP):
            trainer.train_step(next(data))
        if fault == "not deterministic":
            seeds = iter(range(10))
            trainer.augment = lambda views, _: views.float() / 255 + next(seeds) / 8
        with pytest.raises(InputError) as error:
            trainer.train_step(next(data))
    assert str(error.value) == f"cuda_graph: {TOLD[fault]}: use --no-cuda-graph"


@pytest.mark.parametrize("optimizer", [LARSConfig(), AdamWConfig(), SGDConfig()], ids=str)
def test_a_rate_on_the_device_stays_there(
    optimizer: Any, tiny_data: DataConfig, tmp_path: Path
) -> None:
    """Torch's kernels also take a number, and would wait for the device to tell it."""
    recipe = tiny.recipe(tiny_data, tmp_path, probe=tiny.NO_PROBE, optimizer=optimizer)
    trainer = open_trainer(recipe)
    with batches(trainer) as data:
        batch = next(data)
    with Called() as called:
        trainer.update(batch.views, batch.params, batch.labels, *torch.zeros(3).unbind())
    fused = [name for name in called.names if "_fused_" in name]
    assert fused
    assert all(name.endswith(".tensor_lr") for name in fused)


class Called(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_run_without_a_gpu_goes_on_without(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path, probe=tiny.NO_PROBE, steps=2, cuda_graph=True)
    with training(recipe) as trainer:
        assert trainer.graph is None
    line = "cuda_graph: there is no GPU; going on without a CUDA graph"
    assert line in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("device", "distributed", "optimizer", "obstacle"),
    [
        ("cpu", False, LARSConfig(), "there is no GPU"),
        ("cuda", True, LARSConfig(), "it is for one process with --parallel.strategy auto"),
        (
            *("cuda", False, TorchOptimizerConfig("RMSprop")),
            "a step of an optimizer of torch.optim may depend on the host",
        ),
        ("cuda", False, LARSConfig(), ""),
        ("cuda", False, AdamWConfig(), ""),
    ],
)
def test_obstacles(device: str, distributed: bool, optimizer: object, obstacle: str) -> None:
    world: Any = SimpleNamespace(device=torch.device(device), distributed=distributed)
    assert find_obstacle(world, optimizer) == obstacle
