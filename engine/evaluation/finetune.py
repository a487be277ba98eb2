"""Fine-tuning: train encoder and classifier together, on all labels or on a few.

Every combination of learning rate and length is trained in turn, each from the checkpoint. The one
that is best on held-out training images is chosen, and its accuracy on data.val is the result.

Source: BYOL (arXiv 2006.07733), section 4 and appendix C.1.
"""

import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, product
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from annotated_types import Interval, MinLen
from numpy.typing import NDArray
from torch import Generator as RandomNumbers
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from engine.encoder.classifier import save_head
from engine.encoder.hub import CONFIG, describe_network
from engine.encoder.source import Pixels
from engine.evaluation.features import Accuracy, forward, measure_accuracy
from engine.evaluation.results import Result, Row, list_metrics, show_chosen
from engine.evaluation.session import Evaluation
from engine.evaluation.supervised import (
    Examples,
    Held,
    LearningRates,
    SupervisedConfig,
    check_held_out,
    check_labels,
    count_epoch,
    fit_batch,
    hint_at_edge,
    hold_out,
    list_momenta,
    load_crops,
    sum_gradients,
    total_steps,
    train,
)
from engine.method.encoders import Encoder
from engine.method.initialization import initialize
from engine.method.norm import RunningStatistics, synchronize
from engine.method.precision import parameter_dtype
from engine.method.schedule import learning_rate
from shards.errors import InputError
from shards.index import Index
from shards.storage import files

MODEL = "model.safetensors"


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig):
    """Options of fine-tuning. The defaults are the paper's for ImageNet, with few labels or all."""

    epochs: Annotated[tuple[float, ...], Interval(ge=1e-9, le=1e9), MinLen(1)] = (30, 50)
    """Passes over the labeled images. Several numbers are each tried."""
    lr: LearningRates = (0.01, 0.02, 0.05, 0.1, 0.005)
    """Learning rates at batch size 256. Each is tried; it is scaled in proportion to the batch and
    falls to 0 along a cosine."""


class Split(NamedTuple):
    """The images to learn from, and the held-out images to choose the best training on."""

    source: Index  # the data set to learn from
    held: Held  # tells which samples of `source` must not be learned from
    chosen_in: Index  # the data set that has the images to choose on
    chosen_on: NDArray[np.int64]  # their ids in `chosen_in`, rising


def take_all_labels(evaluation: Evaluation, config: FinetuneConfig) -> Split:
    """Learn from the whole training set except the held-out images, and choose on those."""
    index = evaluation.train
    held, ids = hold_out(index.samples, config.holdout, config.seed), np.arange(index.samples)
    return Split(index, held, index, ids[held(ids)])


def evaluate(evaluation: Evaluation, config: FinetuneConfig, split: Split) -> Result | None:
    """Train with each combination of learning rate and length, and measure the best one.

    Return None when a signal stopped the training. Raises InputError when every training diverged.
    """
    config = fit_batch(config, split.source, evaluation)
    training = Finetuning(evaluation, config, split)
    check_labels(evaluation, *split)
    if not train(training, training.batches, evaluation, config.save_every):
        return None
    if training.scores.max() < 0:
        raise InputError("training diverged with every --lr: give lower ones")
    rates = [lr for lr, _ in training.choices]
    hint_at_edge(rates, training.scores.tolist(), evaluation)
    training.take(training.best)
    found = training.measure(evaluation.val)
    if evaluation.world.main:
        _write(evaluation, training.model)
    table: list[Row] = []
    scores = training.scores.tolist()
    for (lr, epochs), score in zip(training.choices, scores, strict=True):
        shown = score if score >= 0 else "diverged"
        row: Row = {"lr": f"{lr:g}", "epochs": f"{epochs:g}", "held-out top-1": shown}
        chosen = len(table) == scores.index(max(scores))
        table.append(row | show_chosen(found, chosen, evaluation.classes))
    return Result(list_metrics(found, evaluation.classes, evaluation.name), table)


def _write(evaluation: Evaluation, model: "Classifier") -> None:
    """Write the network, and the config by which timm and others build it."""
    classes, source = evaluation.train.classes, evaluation.source
    content = save_head(model.tensors(), classes, name=model.encoder.classifier_name)
    files.write(files.join(evaluation.url, MODEL), content)
    config = describe_network(source, MODEL, model.encoder, classes, len(classes))
    files.write(files.join(evaluation.url, CONFIG), json.dumps(config, indent=1).encode())


class Classifier(nn.Module):
    """An encoder and a linear classifier: [B, 3, S, S] -> [B, C]."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc = nn.Linear(encoder.feature_dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.encoder(images))
        return logits

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers on the CPU, under torchvision's names."""
        prefix = f"{self.encoder.classifier_name}."
        named = {**self.encoder.stock_state(), **self.fc.state_dict(prefix=prefix)}
        return {name: value.detach().cpu().contiguous() for name, value in named.items()}


class Finetuning:
    """Runs one training after the other, each from the checkpoint.

    `step` counts the steps of all trainings together.
    """

    def __init__(self, evaluation: Evaluation, config: FinetuneConfig, split: Split) -> None:
        """Raises InputError for --network pixels, for fp16, and when there are too few images."""
        network, source = evaluation.network, evaluation.source
        if isinstance(network, Pixels):
            raise InputError("--network pixels has nothing to fine-tune: measure it by linear")
        if source.precision == "fp16":
            raise InputError("fine-tuning in fp16 is not supported: give --precision bf16 or fp32")
        self.evaluation, self.config, self.split = evaluation, config, split
        self.world = evaluation.world
        self.choices = list(product(config.lr, config.epochs))
        check_held_out(len(split.chosen_on), len(self.choices), evaluation.terminal.say)
        self._steps = [total_steps(split.source, e, config.batch) for _, e in self.choices]
        self.step, self.total_steps = 0, sum(self._steps)
        self.model = Classifier(network, evaluation.classes)
        initialize(self.model.fc, RandomNumbers().manual_seed(config.seed))
        self.model.to(self.world.device, parameter_dtype(source.precision))
        if self.world.size > 1:
            synchronize(self.model, cast(ProcessGroup, dist.group.WORLD))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.0, momentum=config.momentum, nesterov=True
        )
        self._statistics = RunningStatistics([self.model])
        self._first = self._copy()
        self.best = self._copy()
        self.scores = torch.full((len(self.choices),), -1.0, dtype=torch.float64)

    def in_hand(self) -> str:
        """Say which learning rate, epoch and training the next step belongs to."""
        choice, step = self._place(min(self.step, self.total_steps - 1))
        lr, epochs = self.choices[choice]
        epoch = count_epoch(step, self._steps[choice], epochs)
        return f"lr {lr:g}, {epoch}, training {choice + 1} of {len(self.choices)}"

    def train_step(self, batch: Examples) -> Tensor:
        """Update the model once from images [B, 3, S, S].

        The last step of a training also measures the model on the held-out images. Returns this
        process's share of the loss [1]. The loss is the mean over all rows of all processes that
        have a label.
        """
        choice, step = self._place(self.step)
        if step == 0:
            self._start()
        peak = self.choices[choice][0] * self.config.batch / 256
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, peak, 0, self._steps[choice])
        self.model.train()
        known = self.world.all_reduce(torch.tensor(batch.known)).item()
        logits = self._logits(batch.inputs)
        losses = F.cross_entropy(logits, batch.labels, ignore_index=-1, reduction="sum")
        loss = losses / max(1, known)
        loss.backward()
        sum_gradients(self.model, self.world)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._statistics.note()
        self._statistics.apply()
        self.step += 1
        if step + 1 == self._steps[choice]:
            self._finish(choice)
        return loss.detach()[None]

    def batches(self, start: int) -> Generator[Examples, None, None]:
        """Yield the batches from step `start` on. Every training begins with the same batch."""
        config, index = self.config, self.split.source
        source = load_crops(self.evaluation, index, config.batch, config.seed, self.split.held)
        first, place = self._place(start)
        for choice in range(first, len(self.choices)):
            with closing(source(place)) as rows:
                yield from islice(rows, self._steps[choice] - place)
            place = 0

    def measure(
        self, index: Index, ids: NDArray[np.int64] | None = None, field: str = "data.val"
    ) -> Accuracy:
        """Measure the model's accuracy on central crops.

        Args:
            ids: The samples to measure, rising. By default all of them are measured.
            field: The data set's name in the error message.
        """
        self.model.eval()
        with torch.no_grad():
            found = self.evaluation.extract(index, self._logits, ids=ids)
        return measure_accuracy(found.features, found.labels, self.world, field)

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy these parameters and running statistics into the model."""
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(tensors[name])

    def state(self) -> dict[str, Any]:
        """Return the tensors to save. A saved state is loaded into them in place."""
        return {
            "model": self.model.state_dict(),
            "momentum": list_momenta(self.optimizer),
            "best": self.best,
            "scores": self.scores,
        }

    def _logits(self, images: Tensor) -> Tensor:
        precision = self.evaluation.source.precision
        return forward(self.model, images, precision, self.world.device)

    def _place(self, step: int) -> tuple[int, int]:
        """Return which training a step belongs to, and the step's number within that training."""
        choice = 0
        while choice + 1 < len(self._steps) and step >= self._steps[choice]:
            step -= self._steps[choice]
            choice += 1
        return choice, step

    def _start(self) -> None:
        self.take(self._first)
        for buffer in list_momenta(self.optimizer).values():
            buffer.zero_()

    def _finish(self, choice: int) -> None:
        if not all(value.isfinite().all() for value in self.model.parameters()):
            return  # the training has diverged, so it keeps the score -1 and is never chosen
        score = self.measure(self.split.chosen_in, self.split.chosen_on, "data.train").top1
        if score > self.scores.max():
            for name, value in self.model.state_dict().items():
                self.best[name].copy_(value)
        self.scores[choice] = score

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}
