"""Load the official implementation's figures in tests/golden as tensors."""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tests.helpers.places import GOLDEN


@cache
def golden(name: str) -> dict[str, Tensor]:
    """Load all arrays of tests/golden/{name}.npz by name.

    All callers share the tensors, so they must not be changed.
    """
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def deviation(value: Tensor, exact: Tensor) -> float:
    """Return the largest difference, divided by the largest magnitude in `exact`.

    `exact` must not be all zeros.
    """
    value, exact = value.detach().double(), exact.double()
    assert value.shape == exact.shape
    found = float((value - exact).abs().max() / exact.abs().max())
    assert math.isfinite(found)  # A caller's max() could lose a NaN.
    return found
