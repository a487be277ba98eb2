"""Figures of a step: sums over processes, a digest of its data, the rank of its features."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class StepSums:
    """What is logged of a step, as sums that add up over processes.

    `values` [3 + 2 F] float64 on the CPU: loss, head loss, rows, and the normalized features' sum
    and sum of squares.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def of(cls, loss: Tensor, head_loss: Tensor, features: Tensor) -> "StepSums":
        """Of one process: losses [] as its share of the global mean, features [N, F]."""
        unit = torch.nn.functional.normalize(features.double(), dim=1)
        heads = torch.stack([loss.double(), head_loss.double(), unit.new_tensor(len(unit))])
        return cls(torch.cat([heads, unit.sum(0), unit.square().sum(0)]).cpu())

    @property
    def loss(self) -> float | None:
        """None when it is not finite."""
        return _finite(self.values[0].item())

    @property
    def head_loss(self) -> float | None:
        return _finite(self.values[1].item())

    @property
    def feature_std(self) -> float | None:
        """How far features are spread: 1 in all directions alike, 0 when all are one point.

        The mean over F of the standard deviation of the normalized features, times sqrt(F).
        """
        rows = self.values[2]
        total, squares = self.values[3:].chunk(2)
        variance = (squares - total.square() / rows).clamp(min=0) / (rows - 1)
        return _finite((variance.sqrt().mean() * len(total) ** 0.5).item())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def data_digest(ids: NDArray[np.int64], crcs: NDArray[np.uint32]) -> Tensor:
    """An order-free checksum of a batch's sample ids [B] and view CRCs [B] (zeros: ids only).

    The sum, modulo 2**64, of a mixed (splitmix64) word for each sample: equal for equal batches,
    whatever their order, and sums over ranks. An int64 [] whose sums wrap as they should.
    """
    words = ids.astype(np.uint64) ^ (crcs.astype(np.uint64) << np.uint64(32))
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = words ^ (words >> np.uint64(31))
    return torch.tensor(words.sum(dtype=np.uint64).astype(np.int64).item())


def effective_rank(features: Tensor) -> Tensor:
    """How many directions features [N, F] use: exp of the entropy of their singular values.

    Of the centered features; from 1 (collapsed to a line) to min(N - 1, F). Source: Roy and
    Vetterli, "The effective rank" (EUSIPCO 2007).
    """
    centered = features.double() - features.double().mean(dim=0)
    spectrum = torch.linalg.eigvalsh(centered.T @ centered).clamp(min=0).sqrt()
    share = spectrum / spectrum.sum().clamp(min=1e-30)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank
