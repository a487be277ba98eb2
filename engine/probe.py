"""How good the features are while they are learned: kNN and the online head on held-out images."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.augment import normalize
from engine.byol import Online
from engine.metrics import effective_rank
from engine.precision import Precision, autocast, parameter_dtype
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


class Features(NamedTuple):
    """Features of labelled images."""

    features: Tensor  # [N, F] float32 (float64 in fp64)
    labels: Tensor  # [N] int64


class Probe:
    """Measures an online network on data.val, with data.train to look for neighbours in."""

    def __init__(
        self,
        config: ProbeConfig,
        online: Online,
        train: Index,
        val: Index,
        *,
        size: int,
        precision: Precision,
        device: torch.device,
        threads: int,
        corrupt: float,
        report: Callable[[str], None],
    ) -> None:
        """`size`: side of the network's input in pixels; `report` takes warnings about the data."""
        self.config, self.online, self.train, self.val = config, online, train, val
        self.size, self.precision, self.device = size, precision, device
        self.threads, self.corrupt, self.report = threads, corrupt, report

    def evaluate(self) -> dict[str, float]:
        """kNN and the online head on data.val (fractions), and the rank of its features."""
        queries = self.features(self.val)
        found = {"knn_top1": self.knn(self.features(self.train, self.config.bank), queries)}
        if self.online.classifier is not None:
            with torch.no_grad():
                logits = self.online.classifier(queries.features)
            found["online_top1"] = top1(logits, queries.labels)
        found["feature_rank"] = effective_rank(queries.features[:10_000]).item()
        return found

    def pixels_top1(self) -> float:
        """kNN on the pixels themselves: what an encoder has to beat."""
        bank = self.features(self.train, self.config.bank, pixels=True)
        return self.knn(bank, self.features(self.val, pixels=True))

    def features(self, index: Index, limit: int | None = None, pixels: bool = False) -> Features:
        """Features of a data set's labelled images, from the encoder in evaluation mode.

        `pixels`: the images themselves instead.
        """

        def encode(images: Tensor) -> Tensor:
            images = normalize(images.to(parameter_dtype(self.precision)) / 255)
            if pixels:
                return images.flatten(1)
            with autocast(self.precision, self.device):
                features: Tensor = self.online.encoder(images)
            return features.to(images.dtype)

        crops = center_crops(
            index,
            size=self.size,
            fraction=self.config.crop,
            threads=self.threads,
            corrupt=self.corrupt,
            report=self.report,
            limit=limit,
        )
        self.online.eval()
        try:
            return extract(encode, crops, self.device)
        finally:
            self.online.train()

    def knn(self, bank: Features, queries: Features) -> float:
        """`knn_top1` with the recipe's k and temperature."""
        return knn_top1(
            bank,
            queries,
            neighbours=self.config.neighbours,
            temperature=self.config.temperature,
            classes=len(self.train.classes),
        )


@torch.no_grad()
def extract(
    encode: Callable[[Tensor], Tensor], batches: Iterable[EvalBatch], device: torch.device
) -> Features:
    """Features of all labelled samples; `encode` takes uint8 images [B, 3, S, S] on the device.

    Raises InputError when there is none.
    """
    features, labels = [], []
    for batch in batches:
        known = batch.labels >= 0
        if known.any():
            images = batch.images[known].to(device, non_blocking=True)
            features.append(encode(images))
            labels.append(batch.labels[known].to(device))
    if not features:
        raise InputError("evaluation found no labelled image that can be decoded: see data.val")
    return Features(torch.cat(features), torch.cat(labels))


def knn_top1(
    bank: Features, queries: Features, *, neighbours: int, temperature: float, classes: int
) -> float:
    """Fraction of queries whose weighted vote of nearest neighbours (by cosine) is right.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination"
    (arXiv 1805.01978), section 3.4.
    """
    keys = F.normalize(bank.features, dim=1)  # [N, F]
    k = min(neighbours, len(keys))
    correct = torch.zeros((), dtype=torch.int64, device=keys.device)
    for features, labels in zip(
        queries.features.split(1024), queries.labels.split(1024), strict=True
    ):
        similarity = F.normalize(features, dim=1) @ keys.T  # [b, N]
        nearest, which = similarity.topk(k)  # [b, k]
        votes = similarity.new_zeros(len(features), classes)
        votes.scatter_add_(1, bank.labels[which], (nearest / temperature).exp())
        correct += (votes.argmax(dim=1) == labels).sum()
    return correct.item() / len(queries.labels)


def top1(logits: Tensor, labels: Tensor) -> float:
    """Fraction of rows [N, classes] whose largest logit is the label's."""
    return (logits.argmax(dim=1) == labels).float().mean().item()
