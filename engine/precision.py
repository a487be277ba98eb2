"""In which floating-point format a step computes. Parameters are float32 (float64 to verify)."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["fp64", "fp32", "bf16"]


def parameter_dtype(precision: Precision) -> torch.dtype:
    """The dtype of parameters, statistics, optimizer state and of what is sent into the network."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context of the forward passes: bfloat16 where it is safe, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
