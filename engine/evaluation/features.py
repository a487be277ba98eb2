"""Features of a data set's images, as an encoder in evaluation mode gives them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.method.augment import normalize
from engine.method.precision import Precision, autocast, parameter_dtype
from engine.processes.world import World
from shards.center_crops import EvalBatch
from shards.errors import InputError


class Features(NamedTuple):
    """Features of some images: those that this process holds of a data set."""

    features: Tensor  # [N, F] float32 (float64 in fp64)
    labels: Tensor  # [N] int64, -1 where there is none
    ids: Tensor  # [N] int64, sample ids


def forward(
    network: nn.Module, images: Tensor, precision: Precision, device: torch.device
) -> Tensor:
    """What a network makes of uint8 images [B, 3, S, S] on the device, in its parameters' dtype."""
    images = normalize(images.to(parameter_dtype(precision)) / 255)
    with autocast(precision, device):
        output: Tensor = network(images)
    return output.to(images.dtype)


def encoding(
    network: nn.Module, precision: Precision, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """`forward` without gradients, of a network that is put on the device, in evaluation mode."""
    network.to(device, parameter_dtype(precision)).eval()

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        return forward(network, images, precision, device)

    return encode


def extract(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[EvalBatch],
    device: torch.device,
    *,
    unlabeled: bool = False,
    leave: Callable[[], bool] = lambda: False,
) -> Features:
    """Features of all labeled samples, or of all; `encode` takes uint8 images [B, 3, S, S] there.

    Of those before `leave` said so, asked at each batch.
    """
    parts: list[Features] = []
    for batch in batches:
        wanted = (batch.labels >= 0) | unlabeled
        # The first batch goes through even when it is empty: it tells how long features are.
        if wanted.any() or not parts:
            images = batch.images[wanted].to(device, non_blocking=True)
            labels, ids = batch.labels[wanted].to(device), batch.ids[wanted].to(device)
            parts.append(Features(encode(images), labels, ids))
        if leave():
            break
    return Features(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class Accuracy(NamedTuple):
    """Fractions of a data set's labeled images."""

    top1: float
    top5: float


def accuracy(scores: Tensor, labels: Tensor, world: World, field: str) -> Accuracy:
    """How often the label is the class of the highest score, and of the five highest.

    Args:
        scores: [N, C], this process's rows. A class of score -inf, or nan, is never right.
        labels: [N] int64.
        field: Of the data set, for the message.

    Raises InputError when no process has a row.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1)  # [N, 5]
    hits = (best.indices == labels[:, None]) & (best.values > -torch.inf)
    sums = torch.tensor([int(hits[:, 0].sum()), int(hits.sum()), len(labels)])
    first, five, rows = world.all_reduce(sums).tolist()
    if rows == 0:
        raise InputError(f"evaluation found no labeled image that can be decoded: see {field}")
    return Accuracy(first / rows, five / rows)
