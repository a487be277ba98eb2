"""Compute the figures of a step: sums over processes, a data digest, the rank of the features."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.method.update_norms import finite_or_none


class StepSums:
    """Hold the figures of a step as sums, which can be added over processes.

    `values` is [3 + (2 + 3 F) + (2 + 3 D)] float64 on the CPU: the loss, the head loss, the sum of
    `_log_contrasts`, and the sums that `_sum_directions` makes of the features [2 B, F] and of the
    projections [2 B, D].
    """

    def __init__(self, values: Tensor, features: int) -> None:
        """Take the sums of a step, in which a feature vector has `features` numbers."""
        self.values = values
        self._features, self._projections = values[3:].tensor_split([2 + 3 * features])

    @classmethod
    def of(
        cls,
        loss: Tensor,
        head_loss: Tensor,
        features: Tensor,
        projections: Tensor,
        images: Tensor,
    ) -> "StepSums":
        """Compute the sums of one process.

        Args:
            loss: [], this process's share of the global mean.
            head_loss: [], this process's share of the global mean.
            features: [2 B, F], view 1 first, not normalized.
            projections: [2 B, D], likewise.
            images: [2 B, 3, S, S], likewise, as the network sees them.
        """
        heads = [loss.double(), head_loss.double(), _log_contrasts(images).double().sum()]
        values = [torch.stack(heads), _sum_directions(features), _sum_directions(projections)]
        return cls(torch.cat(values).cpu(), features.shape[1])

    @property
    def loss(self) -> float | None:
        """Return the loss, or None when it is not finite."""
        return finite_or_none(self.values[0].item())

    @property
    def head_loss(self) -> float | None:
        return finite_or_none(self.values[1].item())

    @property
    def view_std(self) -> float | None:
        """Return the contrast of the views, or None when it is not finite.

        It is the standard deviation of the normalized pixels of a view about the mean of each
        channel. Of an image's two views the smaller one counts. The result is the geometric mean
        over the images. It is 0.001 when each view has one color, and it cannot exceed 2.3.
        """
        return finite_or_none((self.values[2] / self._features[0]).exp().item())

    @property
    def feature_std(self) -> float | None:
        """Return how far the features are spread, or None when that is not finite."""
        return finite_or_none(_spread(self._features))

    @property
    def projection_std(self) -> float | None:
        """Return how far the projections are spread, or None when that is not finite."""
        return finite_or_none(_spread(self._projections))

    @property
    def view_correlation(self) -> float | None:
        """Return how much the features tell images apart, or None when that is not finite.

        It is 1 when both views of an image have the same features, and about 0 when they are no
        more alike than views of different images. The features are normalized, and the mean of
        each view is subtracted.
        """
        count, products = self._features[:2]
        totals = self._features[2:].chunk(3)[:2]
        means = [total / count for total in totals]
        spreads = [(1 - mean.square().sum()).clamp(min=1e-12) for mean in means]
        covariance = products / count - means[0] @ means[1]
        return finite_or_none((covariance / (spreads[0] * spreads[1]).sqrt()).item())


def _log_contrasts(images: Tensor) -> Tensor:
    """Compute the logarithm [B] of the contrast of each image's two views [2 B, 3, S, S].

    The view with less contrast counts, and one of less than 0.001 counts as 0.001. Blur darkens the
    rim of a view, so even views of one color get some contrast, but hardly ever both of an image.
    """
    first, second = images.float().var(dim=(2, 3), correction=0).mean(1).sqrt().chunk(2)
    return torch.minimum(first, second).clamp(min=1e-3).log()


def _sum_directions(vectors: Tensor) -> Tensor:
    """Add up the vectors [2 B, F] of both views after each is normalized to length 1.

    Returns:
        [2 + 3 F] float64: B, the sum of the scalar products of the two views of an image, the sum
        of the vectors of view 1, that of view 2, and the sum of the squares of all.
    """
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    first, second = unit.chunk(2)  # [B, F] each
    heads = torch.stack([unit.new_tensor(len(first)), (first * second).sum()])
    return torch.cat([heads, first.sum(0), second.sum(0), unit.square().sum(0)])


def _spread(sums: Tensor) -> float:
    """Compute how far vectors are spread, from the sums [2 + 3 F] of `_sum_directions`.

    It is 1 when they spread equally in all directions, and 0 when all are the same point. It is
    the standard deviation of each of the F numbers of the normalized vectors, averaged over F and
    multiplied by sqrt(F).
    """
    rows, (first, second, squares) = 2 * sums[0], sums[2:].chunk(3)
    total = first + second
    variance = (squares - total.square() / rows).clamp(min=0) / (rows - 1)
    return float((variance.sqrt().mean() * len(total) ** 0.5).item())


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
