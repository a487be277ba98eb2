"""Count what is left out of a data set, by reason and with an example."""

from collections.abc import Callable
from typing import NamedTuple


class LeftOut(NamedTuple):
    """The files or samples that are left out for one reason."""

    number: int
    example: str  # the name of one of them, relative to the source


Reasons = dict[str, LeftOut]

_MOST_REASONS = 50  # Names of fields and extensions are a stranger's, and any number may differ.
_MOST_LINES = 20
_OTHER = "other reasons"


def leave_out(reasons: Reasons, reason: str, example: str, number: int = 1) -> None:
    """Count a file or sample under the reason why it is left out."""
    if reason not in reasons and len(reasons) >= _MOST_REASONS:
        reason = _OTHER
    known = reasons.get(reason, LeftOut(0, example))
    reasons[reason] = known._replace(number=known.number + number)


def merge(reasons: Reasons, others: Reasons) -> None:
    """Add what was left out elsewhere."""
    for reason, left in others.items():
        leave_out(reasons, reason, left.example, left.number)


def explain(reasons: Reasons) -> str:
    """Return the first reasons as the end of a message, or "" when there are none."""
    parts = [f"{reason} ({left.number:,})" for reason, left in reasons.items()]
    return f": {'; '.join(parts[:3])}" if parts else ""


def tell_each(lines: list[str], report: Callable[[str], None]) -> None:
    """Report the first lines, and how many more there are."""
    for line in lines[:_MOST_LINES]:
        report(line)
    if len(lines) > _MOST_LINES:
        report(f"and {len(lines) - _MOST_LINES:,} more")


def tabulate(taken: dict[str, int], left_out: Reasons) -> list[str]:
    """Return a table of what was taken and what was left out, one line each."""
    rows = [
        (number, what.replace("s taken", " taken") if number == 1 else what)
        for what, number in taken.items()
    ]
    rows += [
        (left.number, f"left out: {reason}, such as {left.example}")
        for reason, left in left_out.items()
    ]
    width = max(len(f"{number:,}") for number, _ in rows)
    return [f"{number:>{width},} {what}" for number, what in rows]
