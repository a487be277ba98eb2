"""Count the arithmetic of a training step, and say how much of it a GPU can do in a second.

MFU is the first, times the speed, divided by the second (Chowdhery et al., arXiv 2204.02311). What
activation checkpointing computes again does not count.
"""

import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.method.byol import VIEWS, BYOLConfig, Online, Target
from engine.method.head import whole_loss
from engine.method.precision import Precision

# GPUs by a pattern for a part of their names, the more special ones first. Their dense peaks in
# TFLOP/s, as the vendor states them, with bf16 or fp16, with fp32 in the form TF32, and with fp32
# itself.
_PEAKS: list[tuple[str, float, float, float]] = [
    ("B200", 2250, 1125, 75),
    ("GH200|H200", 989.4, 494.7, 66.9),
    ("H100 PCIe", 756, 378, 51),
    ("H100 NVL", 835, 417.5, 60),
    ("H100", 989.4, 494.7, 66.9),
    ("A100", 312, 156, 19.5),
    ("A40", 149.7, 74.8, 37.4),
    ("A30", 165, 82, 10.3),
    ("A10", 125, 62.5, 31.2),
    ("L40S", 362, 183, 91.6),
    ("L40", 181, 90.5, 90.5),
    ("L4", 121, 60, 30.3),
    ("RTX A6000", 154.8, 77.4, 38.7),
    ("RTX 4090$", 165.2, 82.6, 82.6),
]


def count_flops(model: BYOLConfig, classes: int, size: int) -> float:
    """Count the operations of a step for one image: both networks, both views, and the backward.

    A multiplication and an addition are two operations. Nothing is computed.

    Args:
        size: Side of the views in pixels.
    """
    rows = 2  # which batch norm needs
    with torch.device("meta"):
        online, target = Online(model, classes, size), Target(model, size)
        images = torch.empty(VIEWS * rows, 3, size, size)
        labels = torch.zeros(rows, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        output = online(images)
        with torch.no_grad():
            projection = target(images)
        whole_loss(output, projection, labels).backward()
    return float(counter.get_total_flops()) / rows


def find_peak(gpu: str, precision: Precision, tf32: bool) -> float | None:
    """Return the operations that a GPU can do in a second, or None when that is not known.

    Args:
        gpu: The name that the driver has for it.
        tf32: Whether fp32 is computed in the form TF32.
    """
    for name, half, short, full in _PEAKS:
        if re.search(rf"\b({name})\b", gpu):
            by_precision = {"bf16": half, "fp16": half, "fp32": short if tf32 else full}
            peak = by_precision.get(precision)
            return None if peak is None else peak * 1e12
    return None
