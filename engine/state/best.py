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
    """The checkpoint with the largest value of `key` so far; `step` is -1 when there is none."""

    def __init__(self, key: str) -> None:
        """Begin without a checkpoint. An empty key is in no record."""
        self.key, self.step, self.value = key, -1, -math.inf

    def note(self, step: int, record: dict[str, Any]) -> None:
        """Take `step` if its value in `record` is larger than the best one before."""
        value = record.get(self.key)
        if isinstance(value, int | float) and self.value < value < math.inf:
            self.step, self.value = step, float(value)

    def __str__(self) -> str:
        shown = f"{self.value:.1%}" if "_top" in self.key else f"{self.value:.4g}"
        return f"{self.key} {shown}"


def find_best(run: str, key: str, steps: Collection[int]) -> Best:
    """Find the best of the checkpoints of `steps`, and the first of equal ones, in a run's log.

    Raises OSError when the log cannot be read.
    """
    best = Best(key)
    for record in journal.read(run) if key and steps else []:
        if record["step"] in steps:
            best.note(record["step"], record)
    return best
