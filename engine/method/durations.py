"""Read durations: a number of steps, or a text such as "1 epoch", "0.5 epochs" or "300 steps".

An epoch has floor(samples / batch) steps here, as `epoch` in the log counts it.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Any, Literal

import tyro

from shards.documents import shown
from shards.errors import InputError
from shards.fields import Rule

Duration = Annotated[int | str, tyro.conf.arg(metavar="STEPS|EPOCHS")]

LARGEST = 10**15  # steps or epochs
DIGITS = 30  # after the point; a fraction has no larger denominator than they stand for

_NUMBER = r"\d+(?:\.\d+)?|\.\d+|\d+/\d+"
_TEXT = re.compile(rf"\s*({_NUMBER})\s*(steps?|epochs?)?\s*", re.IGNORECASE | re.ASCII)
_LONGEST = 100  # characters of a text, more than what `_written` makes of any duration has
EXAMPLES = "300, '1 epoch' or '0.5 epochs'"


class _OutOfBoundsError(ValueError):
    """A duration that is too long, or too finely divided, which the message says."""


@dataclass(frozen=True)
class Lasting(Rule):
    """The bounds of a duration, as an annotation on a field: at least 0, or more than 0."""

    positive: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise InputError naming the field `name` unless `value` is a duration within bounds."""
        if type(value) is int and value < 0:
            raise InputError(f"{name} must be at least {int(self.positive)}, not {shown(value)}")
        try:
            number, _ = parse(value)
        except _OutOfBoundsError as error:
            raise InputError(f"{name} {error}, not {shown(value)}") from None
        except ValueError:
            given = shown(value)
            raise InputError(
                f"{name} takes a number of steps or of epochs, such as {EXAMPLES}, not {given}"
            ) from None
        if self.positive and not number:
            raise InputError(f"{name} must be more than 0, not {shown(value)}")


def parse(duration: int | str) -> tuple[Fraction, Literal["step", "epoch"]]:
    """Return the number and the unit of a duration. Raises ValueError when it is none.

    A duration has at most LARGEST steps or epochs, and at most DIGITS digits after the point.
    """
    if type(duration) is int and duration >= 0:
        return _bounded(Fraction(duration)), "step"
    if not isinstance(duration, str):
        raise ValueError(duration)
    return _parse_text(duration)


@lru_cache(64)
def _parse_text(duration: str) -> tuple[Fraction, Literal["step", "epoch"]]:
    found = _TEXT.fullmatch(duration) if len(duration) <= _LONGEST else None
    if found is None:
        raise ValueError(duration)
    try:
        number = _bounded(Fraction(found[1]))
    except ZeroDivisionError:
        raise ValueError(duration) from None
    return number, "epoch" if (found[2] or "").lower().startswith("epoch") else "step"


def _bounded(number: Fraction) -> Fraction:
    if number > LARGEST:
        raise _OutOfBoundsError(f"must be at most {LARGEST:,}")
    if number.denominator > 10**DIGITS:
        raise _OutOfBoundsError(f"takes at most {DIGITS} digits after the point")
    return number


def simplify(config: Any, name: str) -> None:
    """Give a new config's field the shortest way to write the same duration.

    So two recipes that mean the same are equal, and a duration of zero is always 0. What is no
    duration stays, because the recipe's check reports it.
    """
    try:
        number, unit = parse(getattr(config, name))
    except ValueError:
        return
    object.__setattr__(config, name, _written(number, unit))


def to_steps(duration: int | str, steps_per_epoch: int) -> int | str:
    """Return the same duration in steps; a part of an epoch may be a fraction, as "7/2 steps".

    LARGEST steps stand for more than that, because no run gets there.
    """
    number, unit = parse(duration)
    steps = number * (steps_per_epoch if unit == "epoch" else 1)
    return _written(min(steps, Fraction(LARGEST)), "step")


def is_due(every: int | str, step: int) -> bool:
    """Return whether something that happens every so many steps happens after `step`.

    Of every 7/2 steps, these are the steps 4, 7, 11 and 14, so that ends of epochs are hit. 0 never
    happens. `every` is in steps: see `to_steps`.
    """
    number, unit = (every, "step") if isinstance(every, int) else parse(every)
    if unit != "step":
        raise ValueError(f"{every} must be turned to steps before")
    return number > 0 and step % number < 1


def _written(number: Fraction, unit: str) -> int | str:
    if not number or (unit == "step" and number.denominator == 1):
        return int(number)
    decimal = repr(float(number))
    exact = "e" not in decimal and Fraction(decimal) == number
    text = decimal.removesuffix(".0") if exact else str(number)
    return f"{text} {unit}" + "s" * (number != 1)
