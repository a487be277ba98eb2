"""Find how a batch is shared out, and at which steps and dates a run passes its landmarks."""

import math
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from statistics import median
from typing import NamedTuple

from engine.log.journal import Record
from engine.method.durations import parse
from engine.method.schedule import learning_rate, tau
from engine.recipe import Recipe
from shards.order import rank_streams

RECENT = 20  # logged steps of a run that its speed is taken from
YEAR = 365.25 * 86400  # seconds


class Share(NamedTuple):
    """A process's part of every batch. Where two numbers stand, processes differ between them."""

    streams: tuple[int, int]
    images: tuple[int, int]  # of a batch
    rows: tuple[int, int]  # images of a micro-batch
    norm_rows: int  # images, of all processes, that share norm statistics for each view


class Speed(NamedTuple):
    """A speed, and who says so."""

    images: float  # a second, of all processes together
    source: str


class Landmark(NamedTuple):
    """A step of the run, and the rates of the update that follows it."""

    name: str
    step: int
    lr: float
    tau: float


def share_batch(recipe: Recipe, processes: int) -> Share:
    """Return what each of `processes` gets of a batch. Raises InputError for too many of them."""
    streams, micro = recipe.data.streams, recipe.batch.micro
    counts = [len(rank_streams(streams, rank, processes)) for rank in range(processes)]
    low, high = min(counts), max(counts)
    each = recipe.batch.size // streams
    images = low * each, high * each
    rows = images[0] // micro, images[1] // micro
    return Share((low, high), images, rows, recipe.batch.size // micro)


def find_speed(given: float | None, log: list[Record], processes: int) -> Speed | None:
    """Return the speed of `processes`: the given one, or what the run's log says, or None.

    `given` is the number of images a second of each process.
    """
    if given is not None:
        return Speed(given * processes, f"{given:g} images a second of each process, as given")
    recent = [record for record in log if record.get("images_per_second")][-RECENT:]
    if not recent:
        return None
    source = f"the median of the run's last {len(recent)} logged steps"
    if all(record.get("images_per_second_device") for record in recent):
        each = median(record["images_per_second_device"] for record in recent)
        return Speed(each * processes, f"{source}, {each:,.1f} for each process")
    return Speed(median(record["images_per_second"] for record in recent), source)


def find_landmarks(recipe: Recipe, samples: int, at: int) -> list[Landmark]:
    """List the landmarks of a run in the order of their steps. It stands at step `at`."""
    schedule, batch = recipe.schedule, recipe.batch.size
    total, warmup = (f(samples, batch) for f in (schedule.total_steps, schedule.warmup_steps))
    power, peak = schedule.tau_power(batch), schedule.peak_lr(batch)
    found = [("newest checkpoint" if at else "start", at)]
    found += [("end of the warm-up", warmup)] if warmup else []
    quarters = enumerate(("one quarter", "one half", "three quarters"), start=1)
    found += [(name, total * number // 4) for number, name in quarters]
    for name, every in (
        ("evaluation", recipe.probe.every),
        ("checkpoint", recipe.checkpoint.every),
    ):
        steps = cadence(every)
        following = math.ceil((at // steps + 1) * steps) if steps else total
        found += [(f"next {name}", min(following, total))] if at < total else []
    if recipe.steps is not None and recipe.steps < total:
        found.append(("--steps", recipe.steps))
    found.append(("end", total))
    return [
        Landmark(
            name,
            step,
            learning_rate(step, peak, warmup, total, decay=schedule.lr_decay),
            tau(step, schedule.base_tau, total, power),
        )
        for name, step in sorted(found, key=lambda pair: pair[1])
    ]


def cadence(every: int | str) -> Fraction:
    """Return the steps between two events, from `every` in steps; 0 when there are none."""
    number, unit = parse(every)
    return max(number, Fraction(1)) if number and unit == "step" else Fraction(0)


def count_due(every: Fraction, total: int) -> int:
    """Count the steps that `durations.is_due` names, and the last one; 0 names that one only."""
    if not every:
        return 1
    return int(total / every) + (total % every >= 1)


def date_of(seconds: float) -> str:
    """Return the date, in UTC, that is so many seconds from now."""
    try:
        return f"{datetime.now(UTC) + timedelta(seconds=seconds):%Y-%m-%d %H:%M}"
    except OverflowError:
        return "after the year 9999"
