"""Shared parts of the evaluations that learn from labels.

These are the batches of images, the choice of held-out images, and the training loop. An evaluation
that was stopped continues with the same command, as a training run does.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from annotated_types import Interval, MinLen
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.evaluation.session import Evaluation
from engine.log.progress import show_progress
from engine.method.augment import flip
from engine.method.schedule import steps_of
from engine.processes import world as processes
from engine.processes.copies import Copies
from engine.processes.parallel import ParallelConfig
from engine.processes.preemption import Preemption
from engine.processes.world import World
from engine.state import checkpoint
from shards.errors import InputError
from shards.index import Index
from shards.loader import Assignment, DataConfig
from shards.loader_process import open_loader
from shards.order import Order, rank_streams
from shards.philox import Domain, draw, uniform
from shards.views import crop_and_flip

STREAMS = 64  # parallel readers of an epoch; fewer when this does not divide the batch
GRACE = 25.0  # seconds after a signal within which the state is saved and the process ends
LINES = 50  # The losses are shown so many times.
BATCH = 1024
FEW = 50  # held-out images; the accuracy on fewer says little

LearningRates = Annotated[tuple[float, ...], Interval(ge=1e-12, le=1e9), MinLen(1)]

Held = Callable[[NDArray[np.int64]], NDArray[np.bool_]]  # ids [N] -> [N], True if held out


@dataclass(frozen=True)
class SupervisedConfig:
    """Options that linear evaluation and fine-tuning share. The defaults are the paper's."""

    batch: Annotated[int, Interval(ge=2, le=2**31)] = BATCH  # a batch norm needs two rows
    """Images in a batch of all processes together. When there are fewer than 1,024 to learn from,
    the default is all of them."""
    momentum: Annotated[float, Interval(ge=1e-9, le=1)] = 0.9
    """Nesterov momentum of SGD."""
    holdout: Annotated[int, Interval(ge=1, le=2**31)] = 10_000
    """Approximate number of training images that are held out to choose the learning rate. It is
    at most a tenth of data.train."""
    seed: Annotated[int, Interval(ge=0, le=2**62)] = 0
    """Seed of the classifier's first weights, the order, the crops and the choice of held-out
    images."""
    save_every: Annotated[int, Interval(ge=1, le=2**31)] = 1000
    """Steps from one saved state to the next. An evaluation that was stopped continues from the
    last one."""

    def settings(self) -> dict[str, Any]:
        """Return the options that decide the result."""
        return {name: value for name, value in asdict(self).items() if name != "save_every"}


_Config = TypeVar("_Config", bound=SupervisedConfig)


class Examples(NamedTuple):
    """One process's rows of a batch."""

    inputs: Tensor  # [B, 3, S, S] uint8, or features [B, F]
    labels: Tensor  # [B], -1 for rows that must not be learned from
    known: int  # number of labels that are not -1, known without asking the device


class Training(Protocol):
    """What `train` needs of a training."""

    step: int
    total_steps: int

    def in_hand(self) -> str:
        """Say what the next step belongs to: the learning rate and the epoch."""
        ...

    def train_step(self, batch: Examples) -> Tensor:
        """Make one update. Returns this process's share of the losses [H]."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the tensors to save. A saved state is loaded into them in place."""
        ...


Batches = Callable[[int], Generator[Examples, None, None]]  # takes the first step


def train(training: Training, batches: Batches, evaluation: Evaluation, save_every: int) -> bool:
    """Train to the last step, starting from the last saved state if there is one.

    Returns False when a signal stopped the training. The saved state stays until the result is
    published.

    Raises OSError when the state could not be saved, and InputError when the data is at fault.
    """
    world, url, total = evaluation.world, evaluation.url, training.total_steps
    digest = evaluation.train.digest  # computed anew at each call, from all shards
    commit = checkpoint.latest(url, world, evaluation.terminal.report)
    if commit is not None:
        state = training.state()
        checkpoint.load(commit, state, world)
        training.step = commit.step
        evaluation.terminal.say(f"resumed at step {commit.step} of {total}")
    first, stopping, shown, loss = training.step, False, "", ""
    with (
        Preemption(world, GRACE) as preemption,
        closing(batches(first)) as data,
        show_progress(evaluation.terminal, training.in_hand(), total, first) as progress,
    ):
        while training.step < total and not stopping:
            now = training.in_hand()
            losses = training.train_step(next(data))
            if training.step == first + 1:
                processes.set_timeout(ParallelConfig.timeout, [])
            stopping = preemption.agreed()
            if training.step == first + 1 or training.step % max(1, total // LINES) == 0:
                world.all_reduce(losses)
                loss = f", loss {losses.min():.4f}"
            if now + loss != shown:
                shown = now + loss
                progress.name(shown)
            progress.advance()
            step = training.step
            # The last step is saved too, because the measurement that follows may fail.
            if stopping or step % save_every == 0 or step == total:
                report = evaluation.terminal.report
                checkpoint.save(url, step, training.state(), {}, digest, world, report=report)
                if world.main:
                    checkpoint.prune(url, step, keep=1, report=report)
    if stopping:
        evaluation.terminal.say(
            f"stopped after step {training.step} by {preemption.reason}: the same command goes on"
        )
    return not stopping


def count_epoch(step: int, steps: int, epochs: float) -> str:
    """Return which epoch a step from 0 to `steps` is in, such as `epoch 12 of 80`."""
    return f"epoch {math.floor(step * epochs / steps) + 1} of {epochs:g}"


def fit_batch(config: _Config, index: Index, evaluation: Evaluation) -> _Config:
    """Make the default batch one of all images, when there are fewer.

    With several processes it is smaller, so that it can be shared out to them. All processes call
    it together, and the result says which batch it was.
    """
    size = evaluation.world.size
    if config.batch != BATCH or index.samples >= BATCH or index.samples < 2 * size:
        return config
    parts = 2 ** math.ceil(math.log2(size)) if size <= STREAMS else 1
    batch = index.samples - index.samples % parts
    evaluation.settings = evaluation.settings | {"batch": batch}
    evaluation.terminal.say(f"batch {batch:,}: data.train has {index.samples:,} images")
    return replace(config, batch=batch)


def hint_at_edge(
    rates: Sequence[float], scores: Sequence[float], evaluation: Evaluation, option: str = "--lr"
) -> None:
    """Tell the user when the highest or the lowest learning rate has the best score.

    Other rates may have the same score, and then a better one may still lie beyond the edge.

    Args:
        rates: The learning rate of each training, or what else is chosen.
        scores: The accuracy of each on held-out images.
        option: The option that gives the rates.
    """
    best = {rate for rate, score in zip(rates, scores, strict=True) if score == max(scores)}
    edges = [(max(rates), "high"), (min(rates), "low")]
    found = [(edge, word) for edge, word in edges if edge in best]
    if not found or len(set(rates)) == 1:
        return
    which = " and the ".join(f"{word}est" for _, word in found)
    values = " and ".join(f"{edge:g}" for edge, _ in found)
    beyond = " and ".join(f"{word}er" for _, word in found)
    text = f"the best {option} is the {which} that was tried, {values}"
    if len(best) > 1:
        were = "were" if len(found) > 1 else "was"
        text = f"the {which} {option} that {were} tried, {values}, shared the best score"
        text += " with others" * (len(best) > len(found))
    evaluation.terminal.say(f"{text}: try {beyond} ones too")


def hold_out(samples: int, wanted: int, seed: int) -> Held:
    """Hold out about `wanted` of a data set's samples, but at most a tenth of them.

    Each sample's id and the seed alone decide whether it is held out.
    """
    fraction = min(wanted / samples, 0.1)

    def held(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = uniform(draw(seed, Domain.HOLDOUT, ids))[..., 0] < fraction
        return found

    return held


def check_held_out(
    count: int,
    choices: int,
    say: Callable[[str], None],
    chosen: str = "learning rate",
    remedy: str = "give the one --lr that you want",
) -> None:
    """Raise InputError when no image is held out to choose the learning rate on, or what else.

    When the best of several `choices` is to be found on few images, a line says so. Call it before
    anything is learned.
    """
    if count == 0:
        raise InputError(
            f"no image of data.train is held out to choose the {chosen} on: raise --holdout, "
            "or give more images"
        )
    if count < FEW and choices > 1:
        say(
            f"{count} held-out images choose the {chosen}, and on so few that is a matter of "
            f"chance: {remedy}, or more labeled images"
        )


def check_labels(
    evaluation: Evaluation,
    source: Index,
    held: Held,
    chosen_in: Index,
    chosen_on: NDArray[np.int64],
) -> None:
    """Raise InputError unless there are labels to learn from, to choose on and to measure on.

    Args:
        source: The data set to learn from.
        held: Tells which samples of `source` must not be learned from.
        chosen_in: The data set that has the images to choose on.
        chosen_on: [n], ids of these images in `chosen_in`, rising.
    """
    ids = np.arange(source.samples)
    learned = ids[~held(ids)]
    evaluation.check_labels(source, "of data.train that is not held out", "learned", learned)
    evaluation.check_labels(chosen_in, "held out of data.train", "chosen on it", chosen_on)
    evaluation.check_labels(evaluation.val, "of data.val", "measured on it")


def hold_out_nothing(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Hold out no sample. This is the `Held` of a data set that is learned from as a whole."""
    return np.zeros(len(ids), bool)


def mask_held_out(labels: Tensor, ids: NDArray[np.int64], held: Held) -> Tensor:
    """Replace the labels [B] of held-out samples by -1."""
    return labels.masked_fill(torch.from_numpy(held(ids)), -1)


def total_steps(index: Index, epochs: float, batch: int) -> int:
    """Return the number of steps of a training.

    Raises InputError when a batch has more images than the data set, or when there is no step.
    """
    if index.samples < batch:
        raise InputError(
            f"--batch {batch} is more than the {index.samples} images to learn from: "
            "give a smaller one"
        )
    steps = steps_of(epochs, index.samples, batch)
    if steps < 1:
        raise InputError(f"--epochs {epochs:g} are less than one step of --batch {batch}")
    return steps


def load_crops(evaluation: Evaluation, index: Index, batch: int, seed: int, held: Held) -> Batches:
    """Load batches of random crops with flips, as uint8 images on the device.

    The loader is the one that BYOL training uses. Raises InputError when there are more processes
    than the batch can be shared out to.
    """
    world, device = evaluation.world, evaluation.world.device
    streams = math.gcd(batch, STREAMS)
    if world.size > streams:
        raise InputError(
            f"--batch {batch} can be shared out to {streams} processes at most, not {world.size}: "
            f"give a multiple of {STREAMS}"
        )
    rules = evaluation.rules
    assignment = Assignment(
        Order(index, seed, streams, batch),
        rank_streams(streams, world.rank, world.size),
        crop_and_flip(evaluation.source.size),
        DataConfig(corrupt=evaluation.corrupt, max_pixels=rules.max_pixels, exif=rules.exif),
        evaluation.threads,
    )
    copies = Copies(device)

    def batches(start: int) -> Generator[Examples, None, None]:
        from_start = assignment._replace(start=start)
        with closing(open_loader(from_start, device, evaluation.terminal.report)) as loader:
            for rows in loader:
                labels = mask_held_out(rows.labels, rows.ids, held)
                known = int((labels >= 0).sum())
                views, params, labels = copies.take(rows.views[0], rows.params[0], labels)
                yield Examples(flip(views, params), labels, known)

    return batches


def sum_gradients(module: nn.Module, world: World) -> None:
    """Sum the gradients over all processes.

    Each process has computed its share of the mean loss, so the sum is the mean's gradient.
    """
    if world.size == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = world.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def list_momenta(optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """Return the optimizer's momentum buffers by the number of their parameter.

    Buffers that do not exist before the first step are created as zeros, which does not change the
    first update.
    """
    found = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        found[str(number)] = state["momentum_buffer"]
    return found
