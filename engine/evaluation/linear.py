"""Linear evaluation: train a linear classifier on the features of the frozen encoder.

One head for each learning rate is trained, all of them in the same pass. The head that is best on
images held out of the training set is chosen, and its accuracy on data.val is the result.

Source: BYOL (arXiv 2006.07733), section 4 and appendix C.1.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Generator as RandomNumbers
from torch import Tensor, nn

from engine.encoder.classifier import name_weights, save_head
from engine.evaluation.features import Accuracy, Features, measure_accuracy
from engine.evaluation.results import Result, Row, list_metrics, show_chosen
from engine.evaluation.session import Evaluation
from engine.evaluation.supervised import (
    Batches,
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
from engine.method.initialization import initialize
from engine.method.precision import parameter_dtype
from engine.method.schedule import learning_rate, steps_of
from engine.processes.world import World
from shards.errors import InputError
from shards.philox import Domain, permutation
from shards.storage import files

HEAD = "head.safetensors"


@dataclass(frozen=True)
class LinearConfig(SupervisedConfig):
    """Options of linear evaluation. The defaults are the paper's."""

    epochs: Annotated[float, Interval(ge=1e-9, le=1e9)] = 80
    """Passes over data.train."""
    lr: LearningRates = (0.4, 0.3, 0.2, 0.1, 0.05)
    """Learning rates at batch size 256. Each trains a head of its own; it is scaled in proportion
    to the batch and falls to 0 along a cosine."""
    fast: bool = False
    """Compute the features of central crops once and learn from those, without random crops and
    flips."""


def evaluate(evaluation: Evaluation, config: LinearConfig) -> Result | None:
    """Train the heads and measure the best one. Return None when a signal stopped the training."""
    index = evaluation.train
    held = hold_out(index.samples, config.holdout, config.seed)
    held_ids = np.flatnonzero(held(np.arange(index.samples)))
    check_held_out(len(held_ids), len(config.lr), evaluation.terminal.say)
    check_labels(evaluation, index, held, index, held_ids)
    config = fit_batch(config, index, evaluation)
    if config.fast:
        bank = evaluation.extract(index)
        batches, steps = make_batches(bank, index.samples, config, held)
    else:
        steps = total_steps(index, config.epochs, config.batch)
        batches = encode_images(
            evaluation, load_crops(evaluation, index, config.batch, config.seed, held)
        )
    training = LinearTraining(
        config, evaluation.network.feature_dim, evaluation.classes, steps, evaluation.world
    )
    training.heads.to(parameter_dtype(evaluation.source.precision))
    if not train(training, batches, evaluation, config.save_every):
        return None
    if not any(head.weight.isfinite().all() for head in training.heads.each):
        raise InputError("training diverged with every --lr: give lower ones")
    aside = evaluation.extract(index, ids=held_ids)
    chosen_on = measure(training.heads, aside, evaluation, "data.train")
    best = max(range(len(config.lr)), key=lambda number: chosen_on[number].top1)
    hint_at_edge(config.lr, [found.top1 for found in chosen_on], evaluation)
    queries = evaluation.extract(evaluation.val)
    found = measure(training.heads, queries, evaluation, "data.val")[best]
    keep_head(training.heads.each[best], evaluation)
    table: list[Row] = []
    for number, (lr, there) in enumerate(zip(config.lr, chosen_on, strict=True)):
        row: Row = {"lr": f"{lr:g}", "held-out top-1": there.top1}
        table.append(row | show_chosen(found, number == best, evaluation.classes))
    kind = "fast_" if config.fast else ""
    metrics = list_metrics(
        found, evaluation.classes, lambda figure: evaluation.name(f"{kind}{figure}")
    )
    return Result(metrics, table)


def keep_head(head: nn.Linear, evaluation: Evaluation) -> None:
    """Write a classifier beside the results, in float32, by the first process."""
    if evaluation.world.main:
        tensors = {"fc.weight": head.weight, "fc.bias": head.bias}
        found = {name: value.detach().float().cpu() for name, value in tensors.items()}
        learned_on = name_weights(evaluation.source)
        saved = save_head(found, evaluation.train.classes, learned_on)
        files.write(files.join(evaluation.url, HEAD), saved)


class Heads(nn.Module):
    """H linear classifiers of the same features: [B, F] -> [H, B, C].

    All of them start with the same weights.
    """

    def __init__(self, count: int, features: int, classes: int, seed: int) -> None:
        super().__init__()
        self.each = [nn.Linear(features, classes) for _ in range(count)]
        self._registered = nn.ModuleList(self.each)  # the names in a saved state begin with it
        for head in self.each:
            initialize(head, RandomNumbers().manual_seed(seed))  # like the official one

    def forward(self, features: Tensor) -> Tensor:
        weights, biases = zip(*((head.weight, head.bias) for head in self.each), strict=True)
        logits = F.linear(features, torch.cat(weights), torch.cat(biases))  # [B, H * C]
        stacked: Tensor = logits.unflatten(1, (len(self.each), -1)).transpose(0, 1)
        return stacked


class LinearTraining:
    """The heads and their optimizer, after `step` updates."""

    def __init__(
        self, config: LinearConfig, features: int, classes: int, total_steps: int, world: World
    ) -> None:
        self.config, self.world, self.total_steps, self.step = config, world, total_steps, 0
        self.heads = Heads(len(config.lr), features, classes, config.seed).to(world.device)
        groups = [{"params": list(head.parameters())} for head in self.heads.each]
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=True)

    def in_hand(self) -> str:
        """Say which learning rates and which epoch the next step belongs to."""
        rates = sorted({f"{lr:g}": lr for lr in self.config.lr}.items(), key=lambda item: item[1])
        shown = rates[0][0] + (f" to {rates[-1][0]}" if len(rates) > 1 else "")
        epoch = count_epoch(self.step, self.total_steps, self.config.epochs)
        return f"lr {shown}, {epoch}"

    def train_step(self, batch: Examples) -> Tensor:
        """Update every head once from features [B, F].

        Returns this process's share of the losses [H]. A loss is the mean over all rows of all
        processes that have a label.
        """
        for group, lr in zip(self.optimizer.param_groups, self.config.lr, strict=True):
            peak = lr * self.config.batch / 256
            group["lr"] = learning_rate(self.step, peak, 0, self.total_steps)
        known = self.world.all_reduce(torch.tensor(batch.known)).item()
        losses = torch.stack(
            [
                F.cross_entropy(logits, batch.labels, ignore_index=-1, reduction="sum")
                for logits in self.heads(batch.inputs)  # [B, C] each
            ]
        ) / max(1, known)
        losses.sum().backward()
        sum_gradients(self.heads, self.world)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return losses.detach()

    def state(self) -> dict[str, Any]:
        """Return the tensors to save. A saved state is loaded into them in place."""
        return {"heads": self.heads.state_dict(), "momentum": list_momenta(self.optimizer)}


def encode_images(evaluation: Evaluation, batches: Batches) -> Batches:
    """Replace the images in the batches by their features from the frozen encoder."""

    def features(start: int) -> Generator[Examples, None, None]:
        for batch in batches(start):
            yield batch._replace(inputs=evaluation.encode(batch.inputs))

    return features


def make_batches(
    bank: Features, samples: int, config: LinearConfig, held: Held
) -> tuple[Batches, int]:
    """Make batches from features that the processes hold, and return them and the number of steps.

    An epoch is a random order of all sample ids except the held-out ones. Each process gets those
    rows of a batch whose features it holds. So the whole batch does not depend on which process
    holds which features.

    Raises InputError when the epochs are less than one step.
    """
    ids = np.flatnonzero(~held(np.arange(samples)))
    rows: NDArray[np.int64] = np.full(samples, -1)
    rows[bank.ids.cpu().numpy()] = np.arange(len(bank.ids))
    batch = min(config.batch, len(ids))
    epoch_steps = len(ids) // batch
    steps = steps_of(config.epochs, epoch_steps, 1)
    if steps < 1:
        raise InputError(f"--epochs {config.epochs:g} are less than one step of --batch {batch}")

    def batches(start: int) -> Generator[Examples, None, None]:
        for step in range(start, steps):
            epoch, place = divmod(step, epoch_steps)
            if place == 0 or step == start:
                order = ids[permutation(config.seed, Domain.FEATURES, ids, epoch)]
            own = rows[order[place * batch : (place + 1) * batch]]
            which = torch.from_numpy(own[own >= 0]).to(bank.features.device)
            yield Examples(bank.features[which], bank.labels[which], len(which))

    return batches, steps


@torch.no_grad()
def measure(heads: Heads, found: Features, evaluation: Evaluation, field: str) -> list[Accuracy]:
    """Measure each head's accuracy on features that the processes hold."""
    return [
        measure_accuracy(
            F.linear(found.features, head.weight, head.bias),
            found.labels,
            evaluation.world,
            field,
        )
        for head in heads.each
    ]
