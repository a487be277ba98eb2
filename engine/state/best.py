"""Rank checkpoints by a value that evaluations measured, such as knn_top1. Larger is better.

The values are those of the log's records of the same steps. So an evaluation that is added later
counts too, and nothing has to be kept beside the log.
"""

import math
import re
from collections.abc import Collection
from typing import Any

from engine.log import journal
from shards.errors import InputError

MEASURED = ("knn_top1", "online_top1", "feature_rank")  # by the evaluations during training


def check_key(key: str, name: str) -> None:
    """Raise InputError, naming the field `name`, unless `key` is a figure that should be large."""
    if not (
        key == "feature_rank" or re.fullmatch(r"[a-z][a-z0-9_.]*_top[15](_on_[0-9a-f]+)?", key)
    ):
        raise InputError(
            f"{name} {key}: must be a figure of an evaluation that is better when it is larger, "
            "such as knn_top1, online_top1, feature_rank or linear_top1"
        )


class Best:
    """The step with the best value of `key` so far; `step` is -1 when there is none."""

    def __init__(self, key: str, *, falls: bool = False, least: float = 0.0) -> None:
        """Begin without a step. An empty key is in no record.

        Args:
            falls: Smaller values are better. By default larger ones are.
            least: The smallest difference by which a value is better than the best one before.
        """
        self.key, self.step, self.value = key, -1, -math.inf
        self._sign, self._least = -1 if falls else 1, least

    def reads(self, record: dict[str, Any]) -> bool:
        """Return whether `record` has a value that can be compared."""
        value = record.get(self.key)
        return isinstance(value, int | float) and -math.inf < value < math.inf

    def note(self, step: int, record: dict[str, Any]) -> bool:
        """Take `step` if its value in `record` is better than the best one before.

        Return whether it is taken.
        """
        if not self.reads(record):
            return False
        value = record[self.key]
        if self.step >= 0 and not self._is_better(self._sign * (value - self.value)):
            return False
        self.step, self.value = step, float(value)
        return True

    def _is_better(self, gain: float) -> bool:
        # A gain of 0.01, from 0.2 to 0.21, is 0.00999... in floating point.
        return gain > 0 and (gain >= self._least or math.isclose(gain, self._least))

    def __str__(self) -> str:
        return f"{self.key} {self.shown}"

    @property
    def shown(self) -> str:
        """Return the value as people read it."""
        return f"{self.value:.1%}" if "_top" in self.key else f"{self.value:.4g}"


def find_best(run: str, key: str, steps: Collection[int]) -> Best:
    """Find the best of the checkpoints of `steps`, and the first of equal ones, in a run's log.

    Raises OSError when the log cannot be read.
    """
    return find_bests(run, key, steps)[0]


def find_bests(run: str, key: str, steps: Collection[int]) -> tuple[Best, Best]:
    """Return the best of the checkpoints of `steps`, as above, and the best of all records."""
    best, ever, wanted = Best(key), Best(key), set(steps)  # 100,000 records are not unusual
    for record in journal.read(run) if key and steps else []:
        ever.note(record["step"], record)
        if record["step"] in wanted:
            best.note(record["step"], record)
    return best, ever
