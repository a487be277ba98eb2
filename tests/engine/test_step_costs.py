"""What a step costs beside the networks' passes, and how much memory it takes."""

import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.explain.sizes import LiveBytes
from engine.fit import fit
from engine.measuring import Meter
from engine.method.byol import BYOLConfig
from engine.method.resnet import ResNetConfig
from engine.processes.preemption import Preemption
from engine.trainer import StepOutput, Trainer
from launch.benchmarks.stock import Stock
from shards.loader import Batch, DataConfig
from tests.helpers import tiny
from tests.helpers.training import open_trainer, training

pytestmark = pytest.mark.versions

SHALLOW, DEEP = 10, 50  # the deeper network has more than three times as many tensors
STEP_OPERATIONS = 80  # of a step beside the networks' passes
CALLS = 15  # of Python and C, for each more tensor of the online network


def open_prepared(data: DataConfig, run: Path, depth: Any, width: float) -> tuple[Trainer, Batch]:
    """A trainer that has made its first step, and a batch."""
    model = BYOLConfig(ResNetConfig(depth=depth, width=width), hidden=32, projection=16)
    trainer = open_trainer(tiny.recipe(data, run, model=model))
    with contextlib.closing(trainer.batches()) as batches:
        trainer.train_step(next(batches))
        return trainer, next(batches)


class Operations(TorchDispatchMode):
    """Count the operators that are dispatched. One over a list of tensors counts once."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Calls:
    """Count the function calls of this thread, of Python and of C."""

    count = 0

    def __enter__(self) -> "Calls":
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, _: FrameType, event: str, __: object) -> None:
        self.count += event in ("call", "c_call")


def count_after_backward(trainer: Trainer, batch: Batch, counter: Any) -> int:
    """Count from the end of the backward pass to the end of the step."""
    note, block = trainer.statistics.note, contextlib.ExitStack()

    def begin() -> None:
        block.enter_context(counter)
        note()

    with pytest.MonkeyPatch.context() as patch, block:
        patch.setattr(trainer.statistics, "note", begin)
        trainer.train_step(batch)
    found: int = counter.count
    return found


def count_both(
    data: DataConfig, folder: Path, make: Callable[[], Any]
) -> Iterator[tuple[int, int]]:
    """Yield the tensors of the online network and what is counted, for two depths."""
    for depth in (SHALLOW, DEEP):
        trainer, batch = open_prepared(data, folder / str(depth), depth, 0.0625)
        tensors = len(list(trainer.online.parameters()))
        yield tensors, count_after_backward(trainer, batch, make())


def test_operators_of_a_step(tiny_data: DataConfig, tmp_path: Path) -> None:
    """After the backward pass their number does not depend on the number of tensors."""
    (few, shallow), (many, deep) = count_both(tiny_data, tmp_path, Operations)
    assert many > 3 * few
    assert shallow == deep <= STEP_OPERATIONS


def test_calls_of_a_step(tiny_data: DataConfig, tmp_path: Path) -> None:
    """After the backward pass each tensor costs only a look at its gradient and its state."""
    (few, shallow), (many, deep) = count_both(tiny_data, tmp_path, Calls)
    assert (deep - shallow) / (many - few) <= CALLS


def peak(step: Callable[[], object], held: list[Any]) -> int:
    """The most bytes that a step holds beside what is there before it."""
    with LiveBytes([leaf for leaf in tree_leaves(held) if isinstance(leaf, Tensor)]) as live:
        step()
    most: int = live.peak
    return most


def test_memory_is_that_of_two_passes(tiny_data: DataConfig, tmp_path: Path) -> None:
    """One pass of both views takes no more than the usual two passes of one view each."""
    trainer, batch = open_prepared(tiny_data, tmp_path, 18, 0.125)
    images = trainer.augment(batch.views.flatten(0, 1), batch.params.flatten(0, 1))
    trainer.augment = lambda *_: images
    stock = Stock(trainer.recipe, trainer.classes, trainer.device)
    view1, view2 = images.contiguous().chunk(2)
    sides: dict[Any, Callable[[], object]] = {
        trainer: lambda: trainer.train_step(batch),
        stock: lambda: stock.step(view1, view2, batch.labels, 0.1, 0.99),
    }
    found = []
    for side, step in sides.items():
        networks = [side.online, side.target]
        held = [[*n.parameters(), *n.buffers()] for n in networks]
        found.append(
            peak(step, [held, list(side.optimizer.state.values()), images, view1, view2, batch])
        )
    assert found[0] <= found[1]


def test_images_go_before_the_next_step(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    take_step = Meter.take_step

    def look(meter: Meter, batch: Batch) -> StepOutput:
        alive.extend(images() is not None for images in earlier)
        output = take_step(meter, batch)
        earlier[:] = [weakref.ref(output.images), weakref.ref(batch.views)]
        return output

    monkeypatch.setattr(Meter, "take_step", look)
    recipe = dataclasses.replace(tiny.recipe(tiny_data, tmp_path, probe=tiny.NO_PROBE), steps=4)
    with training(recipe) as trainer, Preemption(trainer.world, 1.0) as preemption:
        fit(trainer, preemption)
    assert alive == [False] * 6
