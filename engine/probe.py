"""How good the features are while they are learned: kNN and the online head on held-out images."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.augment import normalize
from engine.byol import VIEWS, Online
from engine.metrics import effective_rank
from engine.precision import Precision, autocast, parameter_dtype
from engine.resnet import ResNet, ResNetConfig
from engine.sharding import whole
from engine.world import World
from shards.errors import InputError
from shards.evaluation import EvalBatch, center_crops
from shards.fields import Operation
from shards.index import Index


@dataclass(frozen=True)
class ProbeConfig:
    """Evaluations during training, on data.val; they never touch the training's state."""

    every: Operation[int] = 0
    """Steps from one evaluation to the next; the last step of the run is one too. 0: never."""
    neighbours: Operation[int] = 200
    """k of kNN."""
    temperature: Operation[float] = 0.07
    """Of the neighbours' weights exp(cosine / temperature)."""
    bank: Operation[int] = 50_000
    """Training images to look for neighbours in, about."""
    crop: Operation[float] = 0.875
    """Side of the central crop, as a fraction of the image's shorter side."""
    baseline: Operation[bool] = False
    """Also measure raw pixels and the untrained encoder, before the first step."""


class Stopped(Exception):
    """An evaluation was left because the process is to stop; all processes raise it together."""


class Features(NamedTuple):
    """Features of labelled images."""

    features: Tensor  # [N, F] float32 (float64 in fp64)
    labels: Tensor  # [N] int64


class Probe:
    """Measures an online network on data.val, with data.train to look for neighbours in.

    Images are shared out among the processes by blocks. Features come from an encoder of its own
    that takes over the online one's weights: whole where those are sharded, and in evaluation mode
    without disturbing the training.
    """

    def __init__(
        self,
        config: ProbeConfig,
        online: Online,
        encoder: ResNetConfig,
        train: Index,
        val: Index,
        world: World,
        *,
        size: int,
        precision: Precision,
        threads: int,
        corrupt: float,
        report: Callable[[str], None],
    ) -> None:
        """`size`: side of the network's input in pixels; `report` takes warnings about the data."""
        self.config, self.online, self.train, self.val = config, online, train, val
        self.world, self.size, self.precision = world, size, precision
        self.threads, self.corrupt, self.report = threads, corrupt, report
        self.encoder = ResNet(encoder, VIEWS).to(world.device, parameter_dtype(precision)).eval()

    def evaluate(self, leave: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """kNN and the online head on data.val (fractions), and the rank of its features.

        Raises Stopped, on all processes, once `leave` says so on one.
        """
        queries = self.features(self.val, leave=leave)
        bank = self.features(self.train, self.config.bank, leave=leave)
        found = {"knn_top1": self.knn(bank, queries)}
        head = self.online.classifier
        if head is not None:
            with torch.no_grad():
                logits = F.linear(queries.features, whole(head.weight), whole(head.bias))
            correct = logits.argmax(dim=1) == queries.labels
            found["online_top1"] = self._fraction(correct)
        some = self.world.gather(queries.features[: 10_000 // self.world.size])
        found["feature_rank"] = effective_rank(some).item()
        return found

    def pixels_top1(self) -> float:
        """kNN on the pixels themselves: what an encoder has to beat."""
        bank = self.features(self.train, self.config.bank, pixels=True)
        return self.knn(bank, self.features(self.val, pixels=True))

    def features(
        self,
        index: Index,
        limit: int | None = None,
        *,
        pixels: bool = False,
        leave: Callable[[], bool] = lambda: False,
    ) -> Features:
        """Features of a data set's labelled images, from the encoder in evaluation mode.

        `pixels`: the images themselves instead. Raises Stopped as `evaluate`.
        """

        @torch.no_grad()
        def encode(images: Tensor) -> Tensor:
            images = normalize(images.to(parameter_dtype(self.precision)) / 255)
            if pixels:
                return images.flatten(1)
            with autocast(self.precision, self.world.device):
                features: Tensor = self.encoder(images)
            return features.to(images.dtype)

        if not pixels:
            self._take_weights()
        crops = center_crops(
            index,
            size=self.size,
            fraction=self.config.crop,
            threads=self.threads,
            corrupt=self.corrupt,
            report=self.report,
            limit=limit,
            part=(self.world.rank, self.world.size),
        )
        found = extract(encode, crops, self.world.device, leave)
        if self.world.sum(torch.tensor(int(leave()))) > 0:
            raise Stopped
        return found

    def knn(self, bank: Features, queries: Features) -> float:
        """`knn_top1` with the recipe's k and temperature."""
        bank = Features(self.world.gather(bank.features), self.world.gather(bank.labels))
        if len(bank.labels) == 0:
            raise InputError("evaluation found no labelled image to look up: see data.train")
        correct = knn_correct(
            bank,
            queries,
            neighbours=self.config.neighbours,
            temperature=self.config.temperature,
            classes=len(self.train.classes),
        )
        return self._fraction(correct)

    @torch.no_grad()
    def _take_weights(self) -> None:
        own = self.encoder.state_dict()
        for name, value in self.online.encoder.state_dict().items():
            own[name].copy_(whole(value))

    def _fraction(self, correct: Tensor) -> float:
        """Of `correct` [n] over all processes. Raises InputError when there is no row."""
        right, rows = self.world.sum(torch.tensor([int(correct.sum()), len(correct)])).tolist()
        if rows == 0:
            raise InputError("evaluation found no labelled image that can be decoded: see data.val")
        return float(right / rows)


def extract(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[EvalBatch],
    device: torch.device,
    leave: Callable[[], bool] = lambda: False,
) -> Features:
    """Features of all labelled samples; `encode` takes uint8 images [B, 3, S, S] on the device.

    Of those before `leave` said so, asked at each batch.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        known = batch.labels >= 0
        # The first batch goes through even without labels: it tells how long features are.
        if known.any() or not features:
            images = batch.images[known].to(device, non_blocking=True)
            features.append(encode(images))
            labels.append(batch.labels[known].to(device))
        if leave():
            break
    return Features(torch.cat(features), torch.cat(labels))


@torch.no_grad()
def knn_correct(
    bank: Features, queries: Features, *, neighbours: int, temperature: float, classes: int
) -> Tensor:
    """Which queries [N] the weighted vote of their nearest neighbours (by cosine) gets right.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination"
    (arXiv 1805.01978), section 3.4.
    """
    keys = F.normalize(bank.features, dim=1)  # [N, F]
    k = min(neighbours, len(keys))
    correct = []
    for features, labels in zip(
        queries.features.split(1024), queries.labels.split(1024), strict=True
    ):
        similarity = F.normalize(features, dim=1) @ keys.T  # [b, N]
        nearest, which = similarity.topk(k)  # [b, k]
        votes = similarity.new_zeros(len(features), classes)
        votes.scatter_add_(1, bank.labels[which], (nearest / temperature).exp())
        correct.append(votes.argmax(dim=1) == labels)
    return torch.cat(correct)
