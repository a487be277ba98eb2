"""Judge from the log of a run whether its training is healthy.

The judgment is a pure function of the records so far and of the number of steps of the whole run.
So a resumed run continues with the same one, and an old log can be judged again. The thresholds
were measured with `python -m tests.whole.health_runs`, and engine/README.md has the figures.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from statistics import fmean, median, stdev
from typing import NamedTuple

from engine.log.journal import STOPPED_EARLY, Record

HEALTHY = "healthy"

RECENT = 5  # logged steps that are judged together, so that no single batch raises an alarm
LONG = 20  # logged steps, for figures that a single batch tells little about
COLLAPSED = 0.15  # projection_std; it begins at about 0.8 in every network
COLLAPSING = 0.45
RECOVERED = 0.5  # projection_std that RECENT logged steps on end need after a collapse
UNRELATED = 4.0  # the loss of vectors that have nothing to do with each other
RISEN = 0.7  # times the loss of the first logged steps, after it was below half of that
GROWN = 4.0  # times the gradient's norm at the first logged step
SKIPPED = 0.2  # of the steps
ALIKE = 0.04  # view_correlation, as a mean plus its standard error
FLAT, TOO_WIDE = 0.03, 2.5  # view_std; views of clipped pixels cannot exceed 2.3
TRIED = 1 / 3  # fraction of the run after which kNN has to beat the untrained encoder, twice
INFORMED = 1.3  # times chance; labels on which the untrained encoder gets less tell nothing
SURE = 2.0  # standard errors by which kNN has to be below the untrained encoder
STARVED = 0.5  # data_wait
SLOW = 0.05  # momentum of norms below which their running statistics lag behind; torch's is 0.1
SETTLED = 5  # times 1 / momentum, the steps after which running statistics are those of training
LASTED = 0.5  # of the logged steps, after which a trouble is told at the end though it is over
_BY_RATE = ("diverging", "collapsed", "collapsing")  # what a high learning rate leads to


class Advice(NamedTuple):
    """Say what a status means, what it likely comes from, and what to change."""

    meaning: str
    causes: str
    change: str


# In the trials a lower rate helped where the other two did not, so it comes first.
_CALM = (
    "first lower --schedule.base-lr; if that does not help, give a longer warm-up, such as "
    "--schedule.warmup '20 epochs', or a --schedule.base-tau nearer to 1"
)

ADVICE = {
    "diverging": Advice(
        "the loss or the gradients grow out of bounds",
        "the learning rate is too high or rises too fast, or fp16 overflows",
        "first lower --schedule.base-lr; if that does not help, give a longer warm-up, such as "
        "--schedule.warmup '20 epochs'; with fp16 take --precision bf16",
    ),
    "collapsed": Advice(
        "all images get nearly the same projection, so a low loss means nothing",
        "the learning rate is too high for this batch, there is no warm-up, or the target follows "
        "too fast",
        f"{_CALM}; this run will hardly recover",
    ),
    "collapsing": Advice(
        "the projections of different images become alike, so the loss falls without learning",
        "the learning rate is too high for this batch, there is no warm-up, or the target follows "
        "too fast",
        _CALM,
    ),
    "not learning": Advice(
        "the features do not tell images apart better than before the training",
        "too few steps so far, when kNN alone tells it, because sound runs begin below the "
        "untrained encoder; the images are all alike or damaged on their way, the views are "
        "distorted too much, or the learning rate or the weight decay do not fit",
        "if kNN alone tells it, first train longer, with more --schedule.epochs; otherwise look "
        "at the views in tensorboard and at --data.train, then try another --schedule.base-lr "
        "and a lower --optimizer.weight-decay",
    ),
    "starved": Advice(
        "the training waits for images most of the time",
        "reading or decoding is slower than the training",
        "more --threads and --data.prefetch, a --data.cache on a local disk, or images that are "
        "packed smaller (launch/pack.py --resize)",
    ),
}


class Health(NamedTuple):
    """Hold a status, which is HEALTHY or a key of ADVICE, and the figures that led to it."""

    status: str
    reason: str
    cause: str = ""  # the likeliest one, where the figures tell more than the status does

    @property
    def summary(self) -> str:
        """Return the status with its reason and its meaning, or "" where there is no trouble."""
        if self.status == HEALTHY:
            return ""
        return f"{self.status} ({self.reason}): {ADVICE[self.status].meaning}"

    def describe(self, step: int, known: bool = False) -> str:
        """Return the line that tells the user that the status has turned, or what it still is.

        Args:
            known: What the status means was told before, so the line is short.
        """
        if self.status == HEALTHY:
            return f"health at step {step}: healthy again"
        if known:
            return f"health at step {step}: {self.status} again ({self.reason})"
        advice = ADVICE[self.status]
        causes = "; ".join(filter(None, (self.cause, advice.causes)))
        return (
            f"health at step {step}: {self.summary}; "
            f"likely causes: {causes}; change: {advice.change}"
        )


class History:
    """Hold as much of a log as the rules need, in the order of the steps.

    The rules look at the first logged steps, the newest ones and the newest two evaluations.
    """

    def __init__(
        self, total_steps: int, records: Iterable[Record] = (), momentum: float = 1.0
    ) -> None:
        """Take the records so far of a run that has `total_steps` steps.

        `momentum` is the smallest one of the encoder's norms.
        """
        self.total_steps, self.momentum = total_steps, momentum
        self.collapse = ""
        """The status of a collapse that is not surely over, else ""."""
        self.baseline: Record = {}
        self.first: list[Record] = []
        self.recent: deque[Record] = deque(maxlen=LONG)
        self.evaluated: deque[Record] = deque(maxlen=2)
        self.least_loss = math.inf
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Take the next record, or the newest one again with more keys."""
        if record["step"] == 0:
            self.baseline = self.baseline | record
        if not is_step(record):
            return
        _put(self.recent, record)
        if len(self.first) < RECENT or self.first[-1]["step"] == record["step"]:
            _put(self.first, record)
        if _number(record, "knn_top1") is not None:
            _put(self.evaluated, record)
        if losses := self.newest("loss"):
            self.least_loss = min(self.least_loss, median(losses))
        found = [status for status, find_reason in _COLLAPSES if find_reason(self)]
        spreads = self.newest("projection_std")
        if found:
            self.collapse = found[0]
        elif spreads and min(spreads) >= RECOVERED:
            self.collapse = ""

    @property
    def progress(self) -> float:
        """Return the fraction of the run that is done."""
        return float(self.recent[-1]["step"] / max(1, self.total_steps))

    @property
    def first_loss(self) -> float:
        """Return the largest loss of the first logged steps, or 0 when none is finite."""
        losses = [_number(record, "loss") for record in self.first]
        return max((loss for loss in losses if loss is not None), default=0.0)

    def newest(self, key: str, number: int = RECENT) -> list[float]:
        """Return a figure of the newest `number` records, or nothing when some have none."""
        values = [_number(record, key) for record in list(self.recent)[-number:]]
        found = [value for value in values if value is not None]
        return found if len(found) == number else []


def is_step(record: Record) -> bool:
    """Return whether a record has the figures of a step, and not only those of an evaluation."""
    return record["step"] > 0 and "feature_std" in record


def judge(history: History) -> Health:
    """Judge the newest record by the rules, the worst first."""
    for status, find_reason in _RULES:
        if history.recent and (reason := find_reason(history)):
            lr = _number(history.recent[-1], "lr")
            if status in _BY_RATE and lr is not None:
                reason += f"; lr is {lr:.3g}"
            cause = _find_lag(history) if find_reason is _find_lost_accuracy else ""
            return Health(status, reason, cause)
    return Health(HEALTHY, "")


def _find_fault(history: History) -> str:
    """Find gradients or losses that are not finite."""
    if history.recent[-1].get("loss", 0) is None:
        return "loss is not finite"
    skipped, steps = history.newest("skipped"), history.newest("step")
    if not skipped or skipped[-1] - skipped[0] <= SKIPPED * (steps[-1] - steps[0]):
        return ""
    return f"{skipped[-1] - skipped[0]:.0f} of {steps[-1] - steps[0]:.0f} steps were skipped"


def _find_divergence(history: History) -> str:
    norms, before = history.newest("grad_norm"), _number(history.first[0], "grad_norm")
    if norms and before and median(norms) > GROWN * before:
        return f"grad_norm is {median(norms):.3g}, and was {before:.3g} at first"
    losses, first = history.newest("loss"), history.first_loss
    if not losses:
        return ""
    loss, least = median(losses), history.least_loss
    if loss > max(1.1 * UNRELATED, 1.1 * first):
        return f"loss is {loss:.2f}, more than the {UNRELATED:g} of unrelated vectors"
    if least < first / 2 and loss > RISEN * max(first, UNRELATED):
        return f"loss is {loss:.2f}, and was {least:.2f} before"
    return ""


def _find_collapse(history: History) -> str:
    spreads, long = history.newest("projection_std", 3), history.newest("projection_std", LONG)
    if spreads and median(spreads) < COLLAPSED:
        return f"projection_std is {median(spreads):.2f}, less than {COLLAPSED:g}"
    if long and max(median(long), median(spreads)) < COLLAPSING:
        return f"projection_std stays below {COLLAPSING:g}: it is {median(spreads):.2f}"
    return ""


def _find_collapsing(history: History) -> str:
    spreads = history.newest("projection_std", 3)
    if not spreads or median(spreads) >= COLLAPSING:
        return ""
    return f"projection_std is {median(spreads):.2f}, less than {COLLAPSING:g}"


def _find_lasting_collapse(status: str, history: History) -> str:
    """Find a collapse that is not surely over, so that a run at the threshold does not turn often.

    A projection_std that is not known tells nothing.
    """
    spreads = history.newest("projection_std", 3)
    if history.collapse != status or not spreads:
        return ""
    return (
        f"projection_std is {median(spreads):.2f} after the collapse, and not {RECOVERED:g} or "
        f"more for {RECENT} logged steps yet"
    )


def _find_bad_views(history: History) -> str:
    contrasts = history.newest("view_std", 3)
    if contrasts and median(contrasts) < FLAT:
        return f"view_std is {median(contrasts):.3f}: the views are of one color each"
    if contrasts and median(contrasts) > TOO_WIDE:
        return f"view_std is {median(contrasts):.3g}: the views are not normalized"
    return ""


def _find_equal_images(history: History) -> str:
    alike = history.newest("view_correlation", LONG)
    # In small batches a correlation is uncertain, and a mean below the bound says little.
    if not alike or fmean(alike) + stdev(alike) / LONG**0.5 >= ALIKE:
        return ""
    return f"view_correlation is {fmean(alike):.2f}: the features do not tell images apart"


def _find_lost_accuracy(history: History) -> str:
    untrained, chance = (_number(history.baseline, key) for key in ("knn_untrained", "knn_chance"))
    accuracies = [float(record["knn_top1"]) for record in history.evaluated]
    if untrained is None or not accuracies:
        return ""
    step, total = history.evaluated[-1]["step"], history.total_steps
    ended = step >= total > 0 or STOPPED_EARLY in history.recent[-1]
    if history.progress < TRIED and not ended:
        return ""
    if len(accuracies) < 2 and not ended:  # at the end there will be no second one
        return ""
    # A run that has ended without a gain gets no second chance either, however small the loss.
    noise = 0.0 if ended else _find_noise(untrained, _number(history.evaluated[-1], "knn_images"))
    if max(accuracies) > untrained - SURE * noise or untrained < INFORMED * (chance or 0):
        return ""
    return (
        f"knn_top1 is {accuracies[-1]:.1%} at step {step:,} of {total:,}, "
        f"and {untrained:.1%} without training"
    )


def _find_lag(history: History) -> str:
    """Say that the evaluations come too early for the running statistics, where they do."""
    needed = find_settled(history.momentum)
    if not history.evaluated or history.evaluated[-1]["step"] >= needed:
        return ""
    return (
        "the running statistics, which evaluations use, are not those of training yet, because the "
        f"encoder's norms have a momentum of {history.momentum:g} and need about {needed:,} steps"
    )


def find_settled(momentum: float) -> int:
    """Return the steps after which running statistics are those of training; 0 when it is soon.

    `momentum` is the smallest one of the encoder's norms.
    """
    return round(SETTLED / momentum) if 0 < momentum < SLOW else 0


def _find_noise(accuracy: float, images: float | None) -> float:
    """Return the standard error of an accuracy that was measured on so many images.

    The logs of earlier releases do not tell the number. Their accuracies count as exact, so that
    these logs are judged as they were before.
    """
    if images is None or images < 1:
        return 0.0
    return math.sqrt(max(0.0, accuracy * (1 - accuracy)) / images)


def _find_starvation(history: History) -> str:
    waits = history.newest("data_wait")
    if not waits or median(waits) < STARVED:
        return ""
    return f"data_wait is {median(waits):.0%} of the time"


_COLLAPSES: tuple[tuple[str, Callable[[History], str]], ...] = (
    ("collapsed", _find_collapse),
    ("collapsing", _find_collapsing),
)
_RULES: tuple[tuple[str, Callable[[History], str]], ...] = (
    ("diverging", _find_fault),
    ("diverging", _find_divergence),
    *_COLLAPSES,
    *((status, partial(_find_lasting_collapse, status)) for status, _ in _COLLAPSES),
    ("not learning", _find_bad_views),
    ("not learning", _find_equal_images),
    ("not learning", _find_lost_accuracy),
    ("starved", _find_starvation),
)


def _put(records: list[Record] | deque[Record], record: Record) -> None:
    """Append a record, or put it in the place of the last one when that is of the same step."""
    if records and records[-1]["step"] == record["step"]:
        records.pop()
    records.append(record)


def _number(record: Record, key: str) -> float | None:
    """Return a figure of a record, or None when it has none or the figure is not finite."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
