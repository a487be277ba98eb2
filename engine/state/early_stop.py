"""End a training early, when a figure of its log no longer improves.

What counts is the log alone. So a run that is stopped and goes on ends at the same step as one that
is never stopped. The first process decides, and tells the others.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from annotated_types import Interval

from engine.log.journal import STOPPED_EARLY, Record
from engine.log.metrics import MetricsLog
from engine.method.durations import parse
from engine.processes.world import World
from engine.state.best import MEASURED, Best
from shards.documents import shown
from shards.errors import InputError
from shards.fields import Operation

# The figures that are better when they are smaller. update_ratio is not among them: it follows the
# learning rate, and is 0 in the first step of a warm-up and in steps that are skipped.
FALLING = ("loss", "head_loss", "grad_norm")
RISING = (*MEASURED, "feature_std", "projection_std", "view_correlation")


@dataclass(frozen=True)
class EarlyStopConfig:
    """Configure whether a training ends when a figure of its log no longer improves."""

    key: Operation[str] = ""
    """Name of a figure in the log, such as knn_top1 or loss. The training ends, and is saved, when
    it no longer improves. By default no figure ends it."""
    patience: Operation[Annotated[int, Interval(ge=1, le=10**9)]] = 5
    """Number of measurements in a row without an improvement that end the training. Figures of
    evaluations are measured every probe.every, and all others every log.every. Those within the
    warm-up do not count."""
    least: Operation[Annotated[float, Interval(ge=0, le=1e9)]] = 0.0
    """Smallest change over the best value so far that is an improvement, such as 0.01 for a point
    of an accuracy. With 0 every change for the better is one."""

    def check(self) -> None:
        """Raise InputError when `key` is no figure of the log that can get better."""
        known = (*RISING, *FALLING)
        if not self.key or self.key in known:
            return
        near = difflib.get_close_matches(self.key, known, n=1)
        raise InputError(
            f"early_stop.key {shown(self.key)}: is no figure that the training measures and that "
            + (f"can get better: did you mean {near[0]}? " if near else "can get better: ")
            + f"{'The figures are' if near else 'give one of'} {', '.join(known)}"
        )


def find_doubt(
    config: EarlyStopConfig,
    warmup_steps: int,
    total_steps: int,
    log_every: int | str,
    probe_every: int | str,
) -> str:
    """Return why the figure can never end a run with these lengths, and "" when it can.

    `log_every` and `probe_every` are in steps: see `to_steps`.
    """
    if not config.key:
        return ""
    logged = () if config.key in MEASURED else (log_every,)
    lengths = {length for every in (*logged, probe_every) if (length := parse(every)[0])}
    apart = [n for n in lengths if not any(n % other == 0 for other in lengths - {n})]
    last = total_steps - 1  # the last step ends nothing early
    found = sum(last // n - min(warmup_steps, last) // n for n in map(partial(max, 1), apart))
    found += bool(logged) and warmup_steps < 1 and 1 not in lengths  # step 1 is logged too
    if found > config.patience:
        return ""
    text = (
        f"early_stop.key {config.key} cannot end this run: it is measured {found:,} "
        f"time{'s' * (found != 1)} between the {warmup_steps:,} steps of the warm-up and the last "
        f"step, {total_steps:,}, and early_stop.patience {config.patience:,} needs "
        f"{config.patience + 1:,}: give "
    )
    if warmup_steps >= last:
        return f"{text}a shorter --schedule.warmup"
    rarely = "--probe.every" if config.key in MEASURED else "--log.every"
    return f"{text}a smaller {rarely} or --early-stop.patience"


class Patience:
    """Follow a figure through the records of the log, in order."""

    def __init__(self, config: EarlyStopConfig) -> None:
        self._config = config
        self._best = Best(config.key, falls=config.key in FALLING, least=config.least)
        self._waited = 0  # measurements since the best one

    def note(self, record: Record) -> None:
        """Take the next record. One without a value, or with one that is not finite, is none."""
        if self._best.note(record["step"], record):
            self._waited = 0
        elif self._best.reads(record):
            self._waited += 1

    @property
    def reason(self) -> str:
        """Return why the training is to end now, and "" when it is not."""
        if self._waited < self._config.patience:
            return ""
        least, best = self._config.least, self._best
        better = f"one that is better by {least:g}" if least else "a better one"
        times = f"{self._waited} measurement{'s' * (self._waited != 1)}"
        return f"{best} of step {best.step} was followed by {times} without {better}"


class EarlyStop:
    """Decide for all processes when the training ends early. They call its methods together."""

    def __init__(
        self,
        config: EarlyStopConfig,
        world: World,
        log: MetricsLog,
        warmup_steps: int,
        total_steps: int,
        regular: Callable[[int], bool],
    ) -> None:
        """Take the records of earlier processes.

        Args:
            warmup_steps: The last step whose figures do not count, because sound runs get worse
                during the warm-up.
            total_steps: The last step of the whole run, which ends nothing early.
            regular: Tells whether a step is logged in any case, and not because a process ended
                there.
        """
        self._key, self._world, self._log = config.key, world, log
        self._warmup, self._total, self._regular = warmup_steps, total_steps, regular
        self._patience = Patience(config)
        self.reason = ""  # why the training ends, once it does
        if self._key:
            self.reason = world.on_main(self._look_back)

    def note(self, record: Record) -> None:
        """Take the record of a step, which has been logged."""
        if self._key and self._counts(record):  # so it is on all processes, or on none
            self.reason = self._world.on_main(lambda: self._decide(record))

    def limit(self, step: int, stop: int) -> int:
        """Return the step to stop after: `step`, which is done, if the training ends early."""
        return step if self.reason else stop

    def _counts(self, record: Record) -> bool:
        step = record["step"]
        if self._key not in record or not self._warmup < step < self._total:
            return False
        return self._key in MEASURED or self._regular(step)

    def _decide(self, record: Record) -> str:
        self._patience.note(record)
        return self._mark()

    def _look_back(self) -> str:
        records = self._log.records
        if records and records[-1]["step"] >= self._total:  # the run is at its end anyway
            return ""
        for record in filter(self._counts, records):
            self._patience.note(record)
        return self._mark()

    def _mark(self) -> str:
        reason = self._patience.reason
        if reason:
            self._log.mark({STOPPED_EARLY: reason})
        return reason
