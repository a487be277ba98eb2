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
    if len(steps) <= 2 * columns:
        groups = [np.array([i]) for i in range(len(steps))]
    else:
        column = ((steps - low) / max(high - low, 1e-9) * columns).astype(np.int64)
        groups = np.split(np.arange(len(steps)), np.flatnonzero(np.diff(column)) + 1)
    pieces: list[Points] = [[]]
    for group in groups:
        finite = group[np.isfinite(values[group])]
        if not len(finite):
            if pieces[-1]:
                pieces.append([])
            continue
        there = values[finite]
        kept = {finite[0], finite[there.argmin()], finite[there.argmax()], finite[-1]}
        pieces[-1] += [(float(steps[i]), float(values[i])) for i in sorted(kept)]
    return [piece for piece in pieces if piece]
