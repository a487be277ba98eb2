"""Compute the figures of a step: sums over processes, a data digest, the rank of the features."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class StepSums:
    """Hold the figures of a step as sums, which can be added over processes.

    `values` is [2 + (1 + 2 F) + (1 + 2 D)] float64 on the CPU: the loss, the head loss, and the
    sums that `_sum_directions` makes of the features [N, F] and of the projections [N, D].
    """

    def __init__(self, values: Tensor, features: int) -> None:
        """Take the sums of a step, in which a feature vector has `features` numbers."""
        self.values, self._features = values, features

    @classmethod
    def of(
        cls, loss: Tensor, head_loss: Tensor, features: Tensor, projections: Tensor
    ) -> "StepSums":
        """Compute the sums of one process.

        Args:
            loss: [], this process's share of the global mean.
            head_loss: [], this process's share of the global mean.
            features: [N, F], not normalized.
            projections: [N, D], not normalized.
        """
        losses = torch.stack([loss.double(), head_loss.double()])
        values = [losses, _sum_directions(features), _sum_directions(projections)]
        return cls(torch.cat(values).cpu(), features.shape[1])

    @property
    def loss(self) -> float | None:
        """Return the loss, or None when it is not finite."""
        return _finite(self.values[0].item())

    @property
    def head_loss(self) -> float | None:
        return _finite(self.values[1].item())

    @property
    def feature_std(self) -> float | None:
        """Return how far the features are spread, or None when that is not finite."""
        return _finite(_spread(self.values[2 : 3 + 2 * self._features]))

    @property
    def projection_std(self) -> float | None:
        """Return how far the projections are spread, or None when that is not finite."""
        return _finite(_spread(self.values[3 + 2 * self._features :]))


def _sum_directions(vectors: Tensor) -> Tensor:
    """Count, add and square the vectors [N, F] after each is normalized to length 1.

    Returns:
        [1 + 2 F] float64: N, the sum of the vectors, and the sum of their squares.
    """
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return torch.cat([unit.new_tensor([len(unit)]), unit.sum(0), unit.square().sum(0)])


def _spread(sums: Tensor) -> float:
    """Compute how far vectors are spread, from the sums [1 + 2 F] of `_sum_directions`.

    It is 1 when they spread equally in all directions, and 0 when all are the same point. It is
    the standard deviation of each of the F numbers of the normalized vectors, averaged over F and
    multiplied by sqrt(F).
    """
    rows, (total, squares) = sums[0], sums[1:].chunk(2)
    variance = (squares - total.square() / rows).clamp(min=0) / (rows - 1)
    return float((variance.sqrt().mean() * len(total) ** 0.5).item())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def data_digest(ids: NDArray[np.int64], crcs: NDArray[np.uint32]) -> Tensor:
    """Compute a checksum of a batch's sample ids [B] and view CRCs [B].

    With CRCs of zero it is a checksum of the ids alone. The id and the CRC of each sample are mixed
    to one 64-bit word by splitmix64, and the words are summed modulo 2**64. So the order of the
    samples does not matter, and the checksum of a global batch is the sum of those of its ranks.

    Returns:
        [] int64. Its sums wrap around, which is the sum modulo 2**64.
    """
    words = ids.astype(np.uint64) ^ (crcs.astype(np.uint64) << np.uint64(32))
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words = words ^ (words >> np.uint64(31))
    return torch.tensor(words.sum(dtype=np.uint64).astype(np.int64).item())


def effective_rank(features: Tensor) -> Tensor:
    """Compute how many directions the features [N, F] use, as a number [] in float64.

    It is the exponential of the entropy of the singular values of the centered features, which are
    divided by their sum. It lies between 1, when the features have collapsed to a line, and
    min(N - 1, F).

    Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007).
    """
    centered = features.double() - features.double().mean(dim=0)
    spectrum = torch.linalg.eigvalsh(centered.T @ centered).clamp(min=0).sqrt()
    share = spectrum / spectrum.sum().clamp(min=1e-30)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank
