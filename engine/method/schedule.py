"""Compute the learning rate and the target's averaging rate as pure functions of the step.

A resumed run has no schedule state to restore, because a step always has the same rates.

Source: BYOL (arXiv 2006.07733), "Implementation details".
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal, NamedTuple

from annotated_types import Interval

from engine.method.durations import Duration, Lasting, parse, simplify
from shards.fields import UnitInterval

Decay = Literal["cosine", "none"]


@dataclass(frozen=True)
class ScheduleConfig:
    """Configure the training's length and rates; the defaults are the paper's for 1000 epochs."""

    epochs: Annotated[float, Interval(ge=1e-9, le=1e9)] = 1000
    """Passes over the data set. It may be a fraction."""

    warmup: Annotated[Duration, Lasting()] = "10 epochs"
    """Time in which the learning rate rises linearly from zero: steps, such as 300, or epochs, such
    as '10 epochs'."""

    base_lr: Annotated[float, Interval(ge=0, le=1e9)] = 0.2
    """Peak learning rate at batch size 256; see lr_rule."""

    base_tau: UnitInterval = 0.996
    """Averaging rate of the target network at the first step. It rises to 1 along a cosine."""

    lr_rule: Literal["linear", "fixed"] = "linear"
    """linear makes the peak learning rate base_lr * batch.size / 256. fixed makes it
    base_lr * paper_batch / 256, whatever batch.size is."""

    tau_rule: Literal["fixed", "power"] = "fixed"
    """fixed uses the averaging rate as it is. power raises it to batch.size / paper_batch, so that
    the target averages over as many images as it would with paper_batch (arXiv 2307.13813)."""

    paper_batch: Annotated[int, Interval(ge=1, le=2**31)] = 4096
    """Batch size that base_tau is meant for when tau_rule is power, and base_lr when lr_rule is
    fixed. Otherwise it has no effect."""

    rewarm: Annotated[Duration, Lasting()] = 0
    """Steps, such as 300, or epochs, such as '1 epoch', after a branch in which a factor on the
    learning rate rises linearly from zero to one; see checkpoint.branch."""

    lr_decay: Decay = "cosine"
    """What the learning rate does after the warm-up. cosine lets it fall to 0 at the end. none
    leaves it at its peak."""

    def __post_init__(self) -> None:
        simplify(self, "warmup")
        simplify(self, "rewarm")

    def total_steps(self, samples: int, batch: int) -> int:
        """Return the number of updates of the whole training, by `steps_of`."""
        return steps_of(self.epochs, samples, batch)

    def warmup_steps(self, samples: int, batch: int) -> int:
        """Return the number of updates of the warm-up; `steps_of` counts those of epochs."""
        return _steps(self.warmup, samples, batch)

    def rewarm_steps(self, samples: int, batch: int) -> int:
        """Return the number of updates of the ramp after a branch, as `warmup_steps` does."""
        return _steps(self.rewarm, samples, batch)

    def peak_lr(self, batch: int, base: float | None = None) -> float:
        """Return the learning rate at the end of the warm-up; `base` stands in for base_lr."""
        base = self.base_lr if base is None else base
        return base * (batch if self.lr_rule == "linear" else self.paper_batch) / 256

    def tau_power(self, batch: int) -> float:
        """Return kappa, the power that `tau` is raised to."""
        return batch / self.paper_batch if self.tau_rule == "power" else 1.0


def _steps(duration: int | str, samples: int, batch: int) -> int:
    number, unit = parse(duration)
    return int(number) if unit == "step" else steps_of(float(number), samples, batch)


def steps_of(epochs: float, samples: int, batch: int) -> int:
    """Return floor(epochs * samples / batch), corrected for the rounding of `epochs`.

    The float nearest to 73.6 is a little smaller than 73.6. Without the correction, 73.6 epochs of
    50,000 samples in batches of 256 would be one step short. The same may happen to a number that
    a recipe computes, such as 20 * 16 / 104.
    """
    most = Fraction(epochs) * (1 + Fraction(1, 2**52))  # a rounding error is at most this
    return int(most * samples // batch)


class Ramp(NamedTuple):
    """A factor that rises linearly from 0 at step `first` to 1 over `steps` steps."""

    first: int = 0
    steps: int = 0

    def factor(self, step: int) -> float:
        """Return the factor of a step that is not before the first one."""
        return min(1.0, (step - self.first) / self.steps) if self.steps else 1.0


_NO_RAMP = Ramp()


def learning_rate(
    step: int,
    peak: float,
    warmup: int,
    total: int,
    ramp: Ramp = _NO_RAMP,
    decay: Decay = "cosine",
) -> float:
    """Return the learning rate of a step.

    It rises linearly from 0 to `peak` over `warmup` steps, which may be 0. Then it falls along a
    cosine to 0 at step `total`, or without a `decay` it stays. All of it is multiplied by the
    factor of `ramp`.
    """
    if decay == "cosine" and step >= total:
        return 0.0
    if step < warmup:
        return peak * step / warmup * ramp.factor(step)
    if decay == "none":
        return peak * ramp.factor(step)
    cosine = math.cos(math.pi * (step - warmup) / (total - warmup))
    return peak * (1 + cosine) / 2 * ramp.factor(step)


def tau(step: int, base: float, total: int, power: float = 1.0) -> float:
    """Return the target's averaging rate at a step.

    A cosine rises from `base` at step 0 to 1 at step `total`. The rate is this cosine raised to
    `power`. When a batch is kappa times as large, tau**kappa makes the target average over as many
    images as before. Source: Busbridge et al., "How to scale your EMA" (arXiv 2307.13813),
    definition 1.2.
    """
    progress = min(step / total, 1.0)
    rate = 1 - (1 - base) * (1 + math.cos(math.pi * progress)) / 2
    return math.pow(rate, power)
