"""Map values of more than 8 bits to 0 to 255 by a window."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError

Window = tuple[float, float]  # the values that become 0 and 255

_AT_A_TIME = 1 << 18  # So many values are converted together, to bound the memory.


def apply_window(values: NDArray[Any], window: Window) -> NDArray[np.uint8]:
    """Map values linearly, so that `window` becomes 0 to 255. Values beyond it are clipped.

    The arithmetic is float64, rounded half to even. A value that is not a number becomes 0.
    """
    low, high = window
    flat = values.reshape(-1)
    result = np.empty(flat.shape, np.uint8)
    for start in range(0, len(flat), _AT_A_TIME):
        some = flat[start : start + _AT_A_TIME].astype(np.float64)
        some -= low
        some *= 255 / (high - low)
        np.nan_to_num(some, copy=False, nan=0, posinf=255, neginf=0)
        result[start : start + _AT_A_TIME] = np.rint(np.clip(some, 0, 255, out=some), out=some)
    return result.reshape(values.shape)


def check_window(name: str, window: Window | None, low: float, high: float) -> None:
    """Raise InputError unless an option's two numbers rise, and are from `low` to `high`."""
    if window is not None and not low <= window[0] < window[1] <= high:
        limits = "" if np.isinf(high) else f" from {low:g} to {high:g}"
        raise InputError(
            f"{name} must be two rising numbers{limits}, not {window[0]:g} {window[1]:g}"
        )


def find_range(values: NDArray[Any]) -> tuple[float, float]:
    """Return the smallest and the largest value; 0 and 0 when there are none."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def explain_window(low: float, high: float) -> str:
    """Say that a window is missing for values from `low` to `high`, and how one is given."""
    first, last = (f"{value:.0f}" if value == int(value) else f"{value:g}" for value in (low, high))
    example = f", such as --window {first} {last}" if low < high else ""
    return (
        f"more than 8 bits per channel, and values from {first} to {last}: choose those that "
        f"become black and white with --window LOW HIGH{example}, or --window-percentiles 1 99"
    )
