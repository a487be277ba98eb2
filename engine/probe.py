"""How good the features are while they are learned: kNN and the online head on held-out images."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.evaluation import EvalBatch
from shards.fields import Operation


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

    features: Tensor  # [N, F] float32
    labels: Tensor  # [N] int64


@torch.no_grad()
def extract(
    encode: Callable[[Tensor], Tensor], batches: Iterable[EvalBatch], device: torch.device
) -> Features:
    """Features of all labelled samples; `encode` takes uint8 images [B, 3, S, S] on the device."""
    features, labels = [], []
    for batch in batches:
        known = batch.labels >= 0
        if known.any():
            images = batch.images[known].to(device, non_blocking=True)
            features.append(encode(images).float())
            labels.append(batch.labels[known].to(device))
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
