"""Thin a long curve to what a picture can show, without hiding its extremes."""

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Points = list[tuple[float, float]]


def thin(steps: Values, values: Values, low: float, high: float, columns: int) -> list[Points]:
    """Return the curve's points, as pieces between the places where nothing is finite.

    A short curve keeps all of its points. A long one keeps the first, the smallest, the largest and
    the last value of each column of pixels. So what is drawn is the same, however long the curve
    is, and a single outlier is never lost.

    Args:
        steps: [N] Rising numbers.
        values: [N] One value for each step, which may be NaN or infinite.
        low: The step at the left end of the picture.
        high: The step at the right end.
        columns: The number of columns of pixels.
    """
    pieces: list[Points] = [[]]
    for group in _group(steps, low, high, columns):
        finite = group[np.isfinite(values[group])]
        if not len(finite):
            if pieces[-1]:
                pieces.append([])
            continue
        there = values[finite]
        kept = {finite[0], finite[there.argmin()], finite[there.argmax()], finite[-1]}
        pieces[-1] += [(float(steps[i]), float(values[i])) for i in sorted(kept)]
    return [piece for piece in pieces if piece]


def average(steps: Values, values: Values, low: float, high: float, columns: int) -> list[Points]:
    """Return the mean of each column of pixels of a curve, as `thin` returns its extremes."""
    pieces: list[Points] = [[]]
    for group in _group(steps, low, high, columns):
        finite = group[np.isfinite(values[group])]
        if len(finite):
            pieces[-1].append((float(steps[finite].mean()), float(values[finite].mean())))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def is_long(steps: Values, columns: int) -> bool:
    """Return whether a curve has more points than a picture can show."""
    return len(steps) > 2 * columns


def _group(steps: Values, low: float, high: float, columns: int) -> list[NDArray[np.intp]]:
    """Split a long curve's points by columns of pixels, and a short one's into single points."""
    if not is_long(steps, columns):
        return [np.array([i]) for i in range(len(steps))]
    column = ((steps - low) * columns / max(high - low, 1e-9)).astype(np.int64)
    column = np.minimum(column, columns - 1)  # where the last step is, too
    return np.split(np.arange(len(steps)), np.flatnonzero(np.diff(column)) + 1)
