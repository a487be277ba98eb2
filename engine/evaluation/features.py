"""Compute the features of a data set's images with an encoder in evaluation mode."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.method.augment import normalize
from engine.method.precision import Precision, autocast, parameter_dtype
from engine.processes.copies import Copies
from engine.processes.world import World
from shards.center_crops import EvalBatch
from shards.errors import InputError


class Features(NamedTuple):
    """The features of those images of a data set that this process holds."""

    features: Tensor  # [N, F] float32 (float64 in fp64)
    labels: Tensor  # [N] int64, -1 where there is none
    ids: Tensor  # [N] int64, sample ids


def forward(
    network: nn.Module, images: Tensor, precision: Precision, device: torch.device
) -> Tensor:
    """Run a network on uint8 images [B, 3, S, S] that are on the device.

    The output has the dtype of the network's parameters.
    """
    images = normalize(images.to(parameter_dtype(precision)) / 255)
    with autocast(precision, device):
        output: Tensor = network(images)
    return output.to(images.dtype)


def encoding(
    network: nn.Module, precision: Precision, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return `forward` of this network, without gradients, as a function of the images.

    The network is moved to the device and put into evaluation mode.
    """
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
    """Compute the features of all labeled samples in the batches.

    Args:
        encode: Maps uint8 images [B, 3, S, S] on the device to features [B, F].
        unlabeled: Include the samples that have no label.
        leave: Asked after each batch. When it returns True, the remaining batches are left out.
    """
    parts, copies = list[Features](), Copies(device)
    for batch in batches:
        wanted = (batch.labels >= 0) | unlabeled
        # The first batch is encoded even when it is empty, because it tells the features' length.
        if wanted.any() or not parts:
            images, labels, ids = copies.take(*(tensor[wanted] for tensor in batch))
            parts.append(Features(encode(images), labels, ids))
        if leave():
            break
    return Features(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class Accuracy(NamedTuple):
    """How often the best and one of the five best classes is right, of a set's labeled images."""

    top1: float
    top5: float
    images: int
    mean_class: float | None = None  # mean of the classes' top-1; None where all have equally many


def measure_accuracy(scores: Tensor, labels: Tensor, world: World, field: str) -> Accuracy:
    """Measure how often the label has the highest score, and how often one of the five highest.

    All processes call it together, and the result covers the rows of all of them.

    Args:
        scores: [N, C], this process's rows. A class whose score is -inf or nan is never right.
        labels: [N] int64, this process's labels.
        field: The data set's name in the error message, such as "data.val".

    Raises InputError when no process has a row.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1)  # [N, 5]
    hits = (best.indices == labels[:, None]) & (best.values > -torch.inf)
    counted = [labels[hits[:, 0]], labels[hits.any(dim=1)], labels]
    sums = torch.stack([part.bincount(minlength=scores.shape[1]) for part in counted])  # [3, C]
    sums = world.all_reduce(sums)
    first, five, rows = sums.sum(dim=1).tolist()
    if rows == 0:
        raise InputError(f"evaluation found no labeled image that can be decoded: see {field}")
    right, _, there = sums[:, sums[2] > 0].double()  # of the classes that occur
    even = bool((there == there[0]).all())
    mean_class = None if even else (right / there).mean().item()
    return Accuracy(first / rows, five / rows, rows, mean_class)
