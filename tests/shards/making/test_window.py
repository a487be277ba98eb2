"""Windows: linear, clipped, and without a large copy."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from shards.errors import InputError
from shards.making.window import apply_window, check_window, find_range


@pytest.mark.parametrize("window", [(0, 4095), (100, 101), (-50, 70000), (1000, 1510)])
def test_a_window_is_linear_and_clipped(window: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 5000, (9, 7, 3)).astype(np.uint16)
    low, high = window
    expected = [
        round(min(max(Fraction(int(v) - low) * 255 / (high - low), Fraction(0)), Fraction(255)))
        for v in values.reshape(-1)
    ]
    found = apply_window(values, window)
    assert found.dtype == np.uint8
    assert found.shape == values.shape
    assert found.reshape(-1).tolist() == expected


def test_floats_and_what_is_no_number() -> None:
    values = np.array([[-np.inf, -1.5, 0.25, 0.5], [1, 1e30, np.inf, np.nan]], np.float32)
    assert apply_window(values, (0, 1)).tolist() == [[0, 0, 64, 128], [255, 255, 255, 0]]
    assert find_range(values) == (-1.5, float(np.float32(1e30)))
    assert find_range(np.full((2, 2), np.nan, np.float32)) == (0, 0)


def test_no_wide_copy() -> None:
    values = np.zeros((2000, 2000), np.uint16)
    tracemalloc.start()
    apply_window(values, (0, 4095))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * values.size  # the result has 1 byte for each, and an int32 copy 4 more


@pytest.mark.parametrize("window", [(1, 1), (2, 1), (float("nan"), 1), (0, 101), (-1, 5)])
def test_impossible_percentiles(window: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="--p must be two rising numbers from 0 to 100, not"):
        check_window("--p", window, 0, 100)
