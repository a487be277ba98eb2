"""The roofline's FLOPs are torch's, and its bytes are those that one counts by hand."""

from functools import cache

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.method.byol import BYOLConfig
from engine.method.flops import count_flops
from engine.method.resnet import ResNetConfig
from engine.recipe import Recipe
from launch.benchmarks.roofline import Count, Device, Work, count_step
from shards.views import ViewsConfig

RECIPE = Recipe(
    precision="bf16",
    model=BYOLConfig(ResNetConfig(depth=10, width=0.25), hidden=32, projection=16),
    views=ViewsConfig(size=64),
)
BATCH, CLASSES = 6, 10
DEVICE = Device(bytes=1e9, flops=1e12)


@cache
def count(batch: int) -> dict[str, Work]:
    return count_step(RECIPE, batch, CLASSES, DEVICE)


def test_flops_are_those_of_torchs_counter() -> None:
    found = sum(count(BATCH).values(), Work())
    assert found.flops == BATCH * count_flops(RECIPE.model, CLASSES, 64)


def test_bytes_are_those_of_a_count_by_hand() -> None:
    """A convolution, a norm, a ReLU, an addition, and their backward passes, in float32."""
    rows, channels, outputs, side = 4, 3, 8, 6
    x_bytes = 4 * rows * channels * side**2
    y_bytes = 4 * rows * outputs * side**2
    w_bytes = 4 * outputs * channels * 9
    fake, counter = FakeTensorMode(), Count(DEVICE)
    with fake:
        conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        norm = nn.BatchNorm2d(outputs)
        x = torch.empty(rows, channels, side, side, requires_grad=True)
        upstream = torch.empty(rows, outputs, side, side)
    with fake, counter:
        counter.part = "forward"
        normalized = norm(conv(x))
        y = normalized + torch.relu(normalized)
        counter.part = "backward"
        y.backward(upstream)
    forward, backward = counter.found, counter.found
    assert forward["forward: convolutions"].bytes == x_bytes + w_bytes + y_bytes
    # The gradient of x: dy and w to dx. The gradient of w: dy and x to dw.
    expected = 2 * (y_bytes + w_bytes + x_bytes)
    assert backward["backward: convolutions"].bytes == expected
    few = 4 * outputs  # bytes of a value for each channel
    # The norm reads x twice, and weight, bias and running statistics; it writes y, mean and rstd.
    assert forward["forward: norms"].bytes == 3 * y_bytes + 6 * few
    # It reads x and dy twice, weight, both statistics and running ones; it writes three gradients.
    assert backward["backward: norms"].bytes == 5 * y_bytes + 7 * few
    work = forward["forward: ReLU and additions"]
    counts = 8  # bytes of the norm's count of batches, which is read and written
    assert (work.bytes, work.fused) == (5 * y_bytes + 2 * counts, y_bytes + counts)


def test_each_operation_takes_the_longer_of_both() -> None:
    work = DEVICE.work(2e9, 1e9, 1.5e12)
    assert (work.seconds, work.fused_seconds) == (2.0, 1.5)
    both = work + DEVICE.work(1e9, 0.0, 0.0)
    assert (both.seconds, both.fused_seconds, both.bytes) == (3.0, 1.5, 3e9)


def test_activations_scale_with_the_batch() -> None:
    few, many = count(BATCH), count(2 * BATCH)
    name = "online forward: convolutions"
    assert many[name].flops == 2 * few[name].flops
    assert few[name].bytes < many[name].bytes < 2 * few[name].bytes  # the weights are the same
    assert many["optimizer"] == few["optimizer"]
