"""Measure the features during training, by kNN and the online head on held-out images.

The online head is the online network's linear classifier (`Online.classifier`), which trains along.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from engine.encoder.source import Pixels
from engine.evaluation.features import (
    Accuracy,
    Features,
    encoding,
    extract,
    measure_accuracy,
)
from engine.evaluation.knn import NOT_FINITE, Neighbours, find_nearest, vote
from engine.evaluation.probe_sets import ProbeSets
from engine.evaluation.sheet import Example, choose_examples, write_sheet
from engine.log.figures import effective_rank
from engine.log.journal import FAILED
from engine.method.byol import VIEWS, Online
from engine.method.durations import Duration, Lasting, is_due, simplify
from engine.method.encoders import BackboneConfig
from engine.method.local_shards import whole
from engine.method.precision import Precision, parameter_dtype
from engine.processes.world import World
from shards.allocation import give_back_memory
from shards.center_crops import CropReader
from shards.errors import InputError
from shards.fields import Operation
from shards.index import Index
from shards.storage import files, retries
from shards.threads import run_in_threads

RANKED = 10_000  # The rank is that of the features of so many images at most.


@dataclass(frozen=True)
class ProbeConfig:
    """Options of the evaluations during training.

    They never change the training's state.
    """

    every: Operation[Annotated[Duration, Lasting()]] = 0
    """Time from one evaluation to the next: steps, such as 300, or epochs, such as '5 epochs'. The
    last step of the run is evaluated too. 0 turns evaluations off."""
    train: Operation[str] = ""
    """URL of images with labels, among which kNN looks for neighbors: shards, or a folder of images
    with one folder for each class, which is packed into RUN/probe. Its classes need not be those of
    data.train. By default it is data.train."""
    val: Operation[str] = ""
    """URL of images with labels of the same classes as those of probe.train, which are measured:
    shards, or a folder of images. By default it is data.val."""
    neighbours: Operation[Annotated[int, Interval(ge=1, le=2**31)]] = 200
    """Number of neighbors that vote in kNN."""
    temperature: Operation[Annotated[float, Interval(ge=1e-3, le=1e3)]] = 0.07
    """Temperature of the votes: a neighbor's weight is exp(cosine / temperature)."""
    bank: Operation[Annotated[int, Interval(ge=1)]] = 50_000
    """Approximate number of images of probe.train that are searched for neighbors."""
    crop: Operation[Annotated[float, Interval(ge=1e-3, le=1)]] = 0.875
    """Side of the central crop as a fraction of the image's shorter side."""
    head_lr: Annotated[float | None, Interval(ge=0, le=1e9)] = None
    """Peak learning rate of the online head at batch size 256, which takes the place of
    schedule.base_lr. By default the head has the rate of the networks, as in the official code. In
    a short run that is too low: at the end of the quickstart, the head had 42% with it, 53% with 10
    times and 59% with 100 times the rate, and a linear probe 81%."""
    baseline: Operation[bool] = False
    """Measure kNN on raw pixels (at 32 x 32, where views are larger) and on the untrained encoder
    before the first step, where evaluations follow."""

    def __post_init__(self) -> None:
        simplify(self, "every")

    def due(self, step: int, last: int) -> bool:
        """Return whether to evaluate after `step`. `last` is the last step of the run."""
        return self.every != 0 and (step == last or is_due(self.every, step))


class Stopped(Exception):
    """An evaluation ended early because the process has to stop.

    All processes raise it together.
    """


class Probe:
    """Measures an online network on one set of images, with another one as the bank of kNN.

    The blocks of images are shared out among the processes. The probe has an encoder of its own and
    copies the online encoder's weights into it. This encoder holds whole weights even when the
    online network's are sharded, and it is in evaluation mode, so the training is not disturbed.
    """

    def __init__(
        self,
        config: ProbeConfig,
        online: Online,
        encoder: BackboneConfig,
        sets: ProbeSets,
        world: World,
        crops: CropReader,
        precision: Precision,
    ) -> None:
        """Prepare the probe's encoder, for images that `crops` reads."""
        self.config, self.online, self.sets, self.crops = config, online, sets, crops
        self.train, self.val = sets.train, sets.val
        self.world, self.precision = world, precision
        self.failures = 0
        """The number of evaluations that have failed."""
        self.step = 0
        """The step of the newest evaluation that succeeded. 0 stands for none after training."""
        self._examples: list[Example] = []  # of the newest evaluation
        self._kinds: set[str] = set()  # of failures that were reported
        network = encoder.build(VIEWS, crops.size)
        self.encoder = network.to(world.device, parameter_dtype(precision))
        self.encoder.eval()

    def check_val(self) -> None:
        """Look whether every shard of the images that are measured is there and whole.

        All processes call it together. On a local disk the index has looked already.

        Raises InputError on all processes when a shard is missing or truncated.
        """
        self.world.on_main(lambda: _check_ends(self.val, self.sets.names[1]))

    def attempt(self, step: int, leave: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Evaluate as `evaluate` does. If that fails, report it and return only the reason.

        `step` is the step that was trained last.

        The data of an evaluation may be damaged or vanish while a run trains for days. Training
        does not need it, so it goes on. Each kind of failure is reported once.
        """
        try:
            found = self.evaluate(leave)
            self.step = step
            give_back_memory()
            return found
        except (InputError, OSError) as error:  # all processes get this error
            reason = str(error)
        self.failures += 1
        kind = re.sub(r"\S*/\S*|\d+", "", reason)  # without its places and numbers
        if self.world.main and kind not in self._kinds:
            self._kinds.add(kind)
            self.crops.report(
                f"an evaluation failed: {reason}; training goes on, and metrics.jsonl has "
                f"{FAILED} at each step where this happens"
            )
        return {FAILED: reason}

    def evaluate(self, leave: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Measure the accuracy of kNN and of the online head, and the rank of the features.

        Accuracies are fractions. Without labels only the rank is measured. Raises Stopped on all
        processes when `leave` returns True on one, and InputError on all when one cannot read its
        images, or when features are not finite.
        """
        limit = None if self.sets.knn else RANKED
        queries = self.extract(self.val, limit, leave=leave)
        found: dict[str, Any] = {}
        if self.sets.knn:
            bank = self.extract(self.train, self.config.bank, leave=leave)
            near = find_nearest(bank, queries.features, self.config.neighbours, self.world)
            accuracy = self._vote(near, queries.labels)
            found |= {"knn_top1": accuracy.top1, "knn_images": accuracy.images}
            self._examples = choose_examples(queries, near, self.val.samples, self.world)
        head = self.online.classifier
        if head is not None and self.sets.head:
            with torch.no_grad():
                logits = F.linear(queries.features, whole(head.weight), whole(head.bias))
            name = self.sets.names[1]
            found["online_top1"] = measure_accuracy(logits, queries.labels, self.world, name).top1
        some = self.world.all_gather(queries.features[: RANKED // self.world.size])
        if not some.isfinite().all():  # without kNN, nobody has looked yet
            raise InputError(NOT_FINITE)
        # It may choose a checkpoint, and the libraries of two machines may round it otherwise.
        found["feature_rank"] = self.world.on_main(lambda: effective_rank(some).item())
        return found

    def measure_baseline(self, start: str) -> dict[str, float]:
        """Measure what training has to beat: kNN on raw pixels, on the encoder now, and a guess.

        Returns:
            The accuracies by their keys in the log, where `start` is that of the encoder. There are
            none when kNN cannot be measured, which `sets.notes` explains.
        """
        if not self.sets.knn:
            return {}
        pixels, now = self.measure_pixels(), self.evaluate()["knn_top1"]
        give_back_memory()  # pixels are longer vectors than features: no later step needs as much
        return {"knn_pixels": pixels, start: now, "knn_chance": 1 / len(self.train.classes)}

    def measure_pixels(self) -> float:
        """Measure kNN on the pixels themselves. This is the figure that an encoder has to beat.

        Images that are larger than 32 x 32 are averaged down to that.
        """
        bank = self.extract(self.train, self.config.bank, pixels=True)
        queries = self.extract(self.val, pixels=True)
        near = find_nearest(bank, queries.features, self.config.neighbours, self.world)
        return self._vote(near, queries.labels).top1

    def draw_examples(self, run: str) -> str:
        """Draw some images of the newest evaluation beside their neighbors, below RUN.

        Only one process calls it. It returns the URL of the sheet, or "" when kNN was not measured.

        Raises InputError and OSError when the images cannot be read or the sheet not be written.
        """
        if not self.step or not self._examples:
            return ""
        return write_sheet(run, self.step, self._examples, self.crops, self.train, self.val)

    def extract(
        self,
        index: Index,
        limit: int | None = None,
        *,
        pixels: bool = False,
        leave: Callable[[], bool] = lambda: False,
    ) -> Features:
        """Compute the features of a data set's images with the probe's encoder.

        Images without a label are left out, unless there are no labels to measure with.

        Args:
            limit: Approximate number of images to read. By default all of them are read.
            pixels: Return the pixels as features.

        Raises Stopped on all processes when `leave` returns True on one, and InputError on all
        when one cannot read its images.
        """
        if not pixels:
            self._take_weights()
        network: nn.Module = Pixels(self.crops.size) if pixels else self.encoder
        encode = encoding(network, self.precision, self.world.device)
        found, fault = None, ""
        try:
            crops = self.crops.read(index, limit=limit)
            unlabeled = not self.sets.knn
            found = extract(encode, crops, self.world.device, unlabeled=unlabeled, leave=leave)
        except (InputError, OSError) as error:  # what is missing may be another process's part
            fault = str(error)
        votes = self.world.all_gather_object((leave(), fault))
        if any(left for left, _ in votes):
            raise Stopped
        if faults := [theirs for _, theirs in votes if theirs]:
            raise InputError(faults[0])
        assert found is not None
        return found

    def _vote(self, near: Neighbours, labels: Tensor) -> Accuracy:
        """Measure the accuracy of the neighbors' vote with the recipe's k and temperature."""
        k, temperature = self.config.neighbours, self.config.temperature
        scores = vote(near, k, temperature, len(self.train.classes))
        return measure_accuracy(scores, labels, self.world, self.sets.names[1])

    @torch.no_grad()
    def _take_weights(self) -> None:
        own = self.encoder.state_dict()
        for name, value in self.online.encoder.state_dict().items():
            own[name].copy_(whole(value))


def _check_ends(index: Index, name: str) -> None:
    """Raise InputError unless the last byte of every shard in an object store can be read."""
    if files.is_local(index.folder):  # machines may have the set in other places
        return

    def check(shard: int) -> None:
        url, size = index.shard_url(shard), index.shards[shard].bytes
        try:
            files.read(url, max(0, size - 1), size)
        except FileNotFoundError:
            fault = "is missing"
        except retries.WrongLength:
            fault = f"is truncated: it has less than {size} bytes"
        except OSError as error:
            fault = f"cannot be read ({error})"
        else:
            return
        place = f"{name} {files.redact(index.url)}: shard {index.shards[shard].name}"
        raise InputError(
            f"{place} {fault}; restore it, pack the data set again, or train with --probe.every 0 "
            "--probe.no-baseline"
        )

    run_in_threads(check, range(len(index.shards)), 16)
