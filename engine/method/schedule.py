"""The learning rate and the target's averaging rate, as pure functions of the step.

A resumed run has nothing to restore here: step k has the same rates whenever it is reached.

Source: BYOL (arXiv 2006.07733), "Implementation details".
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

from annotated_types import Interval

from shards.fields import UnitInterval


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, and how fast; the defaults are the paper's 1000 epochs."""

    epochs: Annotated[float, Interval(ge=1e-9, le=1e9)] = 1000
    """Passes over the data set. It may be a fraction."""

    warmup_epochs: Annotated[float, Interval(ge=0)] = 10
    """Epochs in which the learning rate rises linearly from zero."""

    base_lr: Annotated[float, Interval(ge=0, le=1e9)] = 0.2
    """Peak learning rate at batch size 256; see lr_rule."""

    base_tau: UnitInterval = 0.996
    """Averaging rate of the target network at the first step. It rises to 1 along a cosine."""

    lr_rule: Literal["linear", "fixed"] = "linear"
    """How the peak learning rate depends on batch.size. linear scales it as base_lr * size / 256;
    fixed uses paper_batch in place of the size."""

    tau_rule: Literal["fixed", "power"] = "fixed"
    """How tau depends on batch.size. fixed leaves it; power raises it to batch.size / paper_batch,
    so that the target averages over as many images as before (arXiv 2307.13813)."""

    paper_batch: Annotated[int, Interval(ge=1, le=2**31)] = 4096
    """The batch size that base_tau is meant for, and base_lr when lr_rule is fixed."""

    def total_steps(self, samples: int, batch: int) -> int:
        """Updates in all, as `steps_of` counts them."""
        return steps_of(self.epochs, samples, batch)

    def warmup_steps(self, samples: int, batch: int) -> int:
        """Updates of the warm-up, as `steps_of` counts them."""
        return steps_of(self.warmup_epochs, samples, batch)

    def peak_lr(self, batch: int) -> float:
        """The learning rate at the end of the warm-up."""
        return self.base_lr * (batch if self.lr_rule == "linear" else self.paper_batch) / 256

    def tau_power(self, batch: int) -> float:
        """kappa, the power that `tau` is raised to."""
        return batch / self.paper_batch if self.tau_rule == "power" else 1.0


def steps_of(epochs: float, samples: int, batch: int) -> int:
    """floor(epochs * samples / batch), for the number that `epochs` was rounded from.

    The float nearest to 73.6 is a little less, and 73.6 epochs of 50,000 samples in batches of 256
    would be a step short; so may be what a recipe computes, such as 20 * 16 / 104.
    """
    most = Fraction(epochs) * (1 + Fraction(1, 2**52))  # a rounding is no more than that
    return int(most * samples // batch)


def learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """Linear from 0 to `peak` over `warmup` steps (which may be 0), then cosine to 0 at `total`."""
    if step >= total:
        return 0.0
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def tau(step: int, base: float, total: int, power: float = 1.0) -> float:
    """The target's averaging rate: `base` at step 0, along a cosine to 1 at `total`; to a power.

    With kappa times the batch and tau**kappa the target averages over as many images as before:
    Busbridge et al., "How to scale your EMA" (arXiv 2307.13813), definition 1.2.
    """
    progress = min(step / total, 1.0)
    rate = 1 - (1 - base) * (1 + math.cos(math.pi * progress)) / 2
    return math.pow(rate, power)
