"""List the shapes of the tensors of every ResNet that a recipe can have."""

import functools
import itertools
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Size

from engine.method.resnet import ResNet, ResNetConfig

COUNTER = "num_batches_tracked"


class Candidate(NamedTuple):
    """A network that a checkpoint may hold."""

    config: ResNetConfig
    shapes: dict[str, Size]  # in state-dict order
    orders: tuple[list[str], list[str]]  # without counters; projections last, or first, in a block
    further: Size  # shape of the next tensor if the network had one more block


@functools.cache
def candidates(channels: int) -> list[Candidate]:
    """Build all networks whose stem has `channels`, if a recipe can have that width."""
    if not 1 <= channels <= 64 * 64:
        return []
    found = []
    for depth, stem in itertools.product(options("depth"), options("stem")):
        for projection in (False, True) if depth < 50 else (False,):
            config = ResNetConfig(depth, channels / 64, stem, projection)
            with torch.device("meta"):
                net = ResNet(config, views=1)
            shapes = {name: value.shape for name, value in net.state_dict().items()}
            last = [name for name in shapes if COUNTER not in name]
            blocks = itertools.groupby(last, lambda name: name.split(".")[:2])
            first = [n for _, b in blocks for n in sorted(b, key=lambda n: "downsample" not in n)]
            inner = shapes["layer4.0.conv1.weight"]
            further = Size((inner[0], net.feature_dim, *inner[2:]))
            found.append(Candidate(config, shapes, (last, first), further))
    return found


def options(field: str) -> tuple[Any, ...]:
    """Return the values that a field of ResNetConfig can have."""
    return get_args(get_type_hints(ResNetConfig)[field])


def describe(config: ResNetConfig) -> str:
    """Return the name of a network."""
    width = f" x{config.width:g}" if config.width != 1 else ""
    stem = f", {config.stem} stem" if config.stem != ResNetConfig.stem else ""
    shortcut = ", projection shortcut" * config.projection_shortcut
    return f"ResNet-{config.depth}{width}{stem}{shortcut}"
