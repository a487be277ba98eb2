"""The official implementation's figures in tests/golden, as tensors."""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tests.helpers.places import GOLDEN


@cache
def golden(name: str) -> dict[str, Tensor]:
    """All arrays of tests/golden/{name}.npz by their name; shared, so not to be changed."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def deviation(value: Tensor, exact: Tensor) -> float:
    """The largest difference, as a share of the largest entry of `exact` (which is not zero)."""
    value, exact = value.detach().double(), exact.double()
    assert value.shape == exact.shape
    found = float((value - exact).abs().max() / exact.abs().max())
    assert math.isfinite(found)  # nan would get lost in a maximum
    return found
