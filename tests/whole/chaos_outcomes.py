"""What the faults of chaos.py did to the job, by what is left of it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

UNKNOWN = "unknown"
BATCH = 16  # images of a step
LOSS_BOUND = 1e-6  # relative, in float64: what the rounding of another number of processes grew to


@dataclass
class Fault:
    """One that struck."""

    name: str
    first: int
    """The first step that was taken after it: after a restart, one that is done again."""
    outcome: str = UNKNOWN
    repeated: int = 0
    """Steps done again."""
    lost: int = 0
    """Samples that the undisturbed run saw in the steps up to the next fault, and this one not."""


def count_lost(
    faults: list[Fault], found: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    """Lay each step without the undisturbed run's digest to the last fault that it came after."""
    digests = {record["step"]: record["data_digest"] for record in found}
    for fault in faults:
        fault.lost = 0
    for record in expected:
        before = [fault for fault in faults if fault.first <= record["step"]]
        if before and digests.get(record["step"]) != record["data_digest"]:
            before[-1].lost += BATCH


def table(names: Iterable[str], faults: list[Fault], requests: dict[str, int]) -> str:
    """A row for each kind of fault, and one for each kind of harmed requests, which are counted."""
    lines = ["| fault | times | outcome | samples lost | steps repeated |", "|-|-|-|-|-|"]
    for name in names:
        these = [fault for fault in faults if fault.name == name]
        outcomes = Counter(fault.outcome for fault in these).items()
        told = [text if len(outcomes) == 1 else f"{text} ({times})" for text, times in outcomes]
        lost, repeated = sum(f.lost for f in these), sum(f.repeated for f in these)
        lines.append(f"| {name} | {len(these)} | {'; '.join(told)} | {lost} | {repeated} |")
    lines += [f"| request: {kind} | {times} | | | |" for kind, times in requests.items()]
    return "\n".join(lines)
