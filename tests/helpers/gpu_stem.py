"""Try on a GPU what could make the stem's convolution of a ResNet faster; nothing of it is built.

    python -m tests.helpers.gpu_stem OUT IMAGES SIZE ROUNDS

On an H100 the stem took ten times what its bytes need, because cuDNN has no fast kernel for three
channels. Each way computes the same convolution of 7 x 7 and stride 2, forward and the gradient of
its weights, compiled in bf16 on a GPU.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.processes.compiling import compiled
from launch.benchmarks.machine import read_head
from launch.benchmarks.measuring import CUDA, Cost, alternate, measure, repeat
from launch.benchmarks.results import Report, publish, speeds

Way = Callable[[Tensor, Tensor], Tensor]
PASSES = 20 if CUDA else 1


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve images [N, 3, S, S] with the weights [64, 3, 7, 7], as the stem does."""
    return F.conv2d(x, weight, stride=2, padding=3)


def convolve_padded(x: Tensor, weight: Tensor, channels: int) -> Tensor:
    """Do the same with so many channels, of which all but three are zeros."""
    zeros = (0, 0, 0, 0, 0, channels - 3)
    return convolve(F.pad(x, zeros), F.pad(weight, zeros))


def convolve_folded(x: Tensor, weight: Tensor) -> Tensor:
    """Do the same on squares of 2 x 2 pixels, of which each is one pixel of 12 channels.

    The weights get a row and a column of zeros before them, and are folded alike. So stride 2
    becomes 1, and 8 x 8 becomes 4 x 4.
    """
    squares = F.pad(F.pixel_unshuffle(x, 2), (2, 1, 2, 1))
    return F.conv2d(squares, F.pixel_unshuffle(F.pad(weight, (1, 0, 1, 0)), 2))


WAYS: dict[str, Way] = {
    "as it is": convolve,
    "4 channels": partial(convolve_padded, channels=4),
    "8 channels": partial(convolve_padded, channels=8),
    "squares": convolve_folded,
}


def measure_ways(out: str, images: int, size: int, rounds: int) -> Report:
    """Measure each way beside the one that the stem takes."""
    device = torch.device("cuda" if CUDA else "cpu")
    x = torch.rand(images, 3, size, size, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(64, 3, 7, 7, device=device, requires_grad=True)
    sides: dict[str, Callable[[], Cost]] = {}
    for name, way in WAYS.items():
        work = partial(_pass, compiled(way) if CUDA else way, x, weight)
        repeat(work, 3)  # the first one compiles
        sides[name] = partial(measure, partial(repeat, work, PASSES), PASSES * images)
    costs = alternate(sides, rounds)
    usual, *others = WAYS
    rows = [row for name in others for row in speeds(name, costs[name], costs[usual], usual)]
    title = [f"stem: {images} images of {size} px, forward and gradient of the weights"]
    return Report([*title, f"medians of {rounds} rounds of {PASSES} passes"], rows, out)


def _pass(way: Way, x: Tensor, weight: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=CUDA):
        y = way(x, weight)
    torch.autograd.grad(y, weight, torch.ones_like(y))


if __name__ == "__main__":
    head = read_head()
    images, size, rounds = map(int, sys.argv[2:])
    publish(measure_ways(sys.argv[1], images, size, rounds), head, sys.argv[1:])
