"""Residual networks of depth 10 to 200 and any width, for large or small images.

Parameter names and shapes are torchvision's (without `fc`), so weights can be exchanged both ways.
The stride of a bottleneck is on its 3x3 convolution. Padding is symmetric, as usual in PyTorch.
The official network's "SAME" padding differs from it at even sizes.

Source: He et al. (arXiv 1512.03385); BYOL (arXiv 2006.07733), "Implementation details".
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from engine.method.norm import BatchNorm
from shards.fields import check_range

_BLOCKS = {  # by depth: the number of blocks in each of the four groups
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


@dataclass(frozen=True)
class ResNetConfig:
    """Choose a residual network; the default is the paper's main encoder."""

    depth: Literal[10, 18, 34, 50, 101, 152, 200] = 50
    """Number of layers with weights. Networks up to 34 have basic blocks, from 50 on they have
    bottlenecks."""

    width: Annotated[float, Interval(ge=1 / 64, le=64)] = 1.0
    """Factor on the number of channels of every layer."""

    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers. imagenet is a 7x7 convolution of stride 2 and a max pool; cifar, for images of
    32 pixels, is a 3x3 convolution of stride 1."""

    projection_shortcut: bool = False
    """Give the first group of a basic-block network a projection in its shortcut, as the official
    networks have it."""

    @property
    def blocks(self) -> tuple[int, int, int, int]:
        """Return the number of residual blocks in each of the four groups."""
        return _BLOCKS[self.depth]

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Return the channels of each group; a bottleneck outputs four times as many."""
        w = self.width
        return int(64 * w), int(128 * w), int(256 * w), int(512 * w)

    @property
    def bottleneck(self) -> bool:
        """Return whether the blocks are bottlenecks."""
        return self.depth >= 50

    @property
    def fixed_size(self) -> bool:
        """Return whether the network's weights are for one size of images."""
        return False

    def check_size(self, size: int, field: str = "views.size") -> None:
        """Raise InputError naming the `field` when the network cannot take images of `size`."""
        least = 32 if self.stem == "imagenet" else 8
        check_range(field, size, Interval(ge=least, le=2**12))

    def describe(self) -> str:
        """Return the network's name for people."""
        return f"ResNet-{self.depth} x{self.width:g}"

    def build(self, views: int, _size: int) -> "ResNet":
        """Build the network, which takes images of any size."""
        return ResNet(self, views)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int, project: bool, views: int) -> nn.Module:
    if project or stride > 1 or inputs != outputs:
        return nn.Sequential(_conv(inputs, outputs, 1, stride), BatchNorm(outputs, views))
    return nn.Identity()


class BasicBlock(nn.Module):
    """A block of two 3x3 convolutions, [N, inputs, H, W] -> [N, channels, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int, project: bool, views: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, channels, 3, stride)
        self.bn1 = BatchNorm(channels, views)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = BatchNorm(channels, views)
        self.downsample = _shortcut(inputs, channels, stride, project, views)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """A block of 1x1, 3x3 and 1x1 convolutions.

    It maps [N, inputs, H, W] to [N, 4*channels, H/stride, W/stride].
    """

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int, project: bool, views: int) -> None:
        super().__init__()
        outputs = channels * self.expansion
        self.conv1 = _conv(inputs, channels, 1)
        self.bn1 = BatchNorm(channels, views)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn2 = BatchNorm(channels, views)
        self.conv3 = _conv(channels, outputs, 1)
        self.bn3 = BatchNorm(outputs, views)
        nn.init.zeros_(self.bn3.weight)  # the block starts as its shortcut; see model.last_gamma
        self.downsample = _shortcut(inputs, outputs, stride, project, views)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """A residual network without its classifier: [N, 3, H, W] -> features [N, feature_dim].

    `views` is the number of views that are stacked in a training batch (see BatchNorm). The
    weights have torch's defaults until `initialize` draws them.
    """

    classifier_name = "fc"  # what torchvision calls the classifier that is left out

    def __init__(self, config: ResNetConfig, views: int) -> None:
        super().__init__()
        block = Bottleneck if config.bottleneck else BasicBlock
        (n1, n2, n3, n4), (c1, c2, c3, c4) = config.blocks, config.channels
        imagenet = config.stem == "imagenet"

        def group(
            inputs: int, channels: int, blocks: int, stride: int, project: bool
        ) -> nn.Sequential:
            outputs = channels * block.expansion
            first = block(inputs, channels, stride, project, views)
            rest = (block(outputs, channels, 1, False, views) for _ in range(blocks - 1))
            return nn.Sequential(first, *rest)

        self.conv1 = _conv(3, c1, 7, 2) if imagenet else _conv(3, c1, 3)
        self.bn1 = BatchNorm(c1, views)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if imagenet else nn.Identity()
        self.layer1 = group(c1, c1, n1, 1, config.projection_shortcut)
        self.layer2 = group(c1 * block.expansion, c2, n2, 2, False)
        self.layer3 = group(c2 * block.expansion, c3, n3, 2, False)
        self.layer4 = group(c3 * block.expansion, c4, n4, 2, False)
        self.feature_dim = c4 * block.expansion

    def blocks(self) -> list[nn.Module]:
        """List all residual blocks, in order."""
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        return [block for layer in layers for block in layer]

    def stock_module(self) -> nn.Module:
        """Return the module whose state dict has torchvision's names."""
        return self

    def stock_state(self) -> dict[str, Tensor]:
        """Return parameters and buffers by torchvision's names."""
        return self.state_dict()

    def stem(self, x: Tensor) -> Tensor:
        """Apply the layers before the first block.

        At width 1, the imagenet stem maps [N, 3, H, W] to [N, 64, H/4, W/4], and the cifar stem
        maps it to [N, 64, H, W].
        """
        x = self.bn1(self.conv1(x))  # [N, 64, H/2, W/2] with the imagenet stem
        # ReLU and the maximum may change places. Here it has a quarter of the pixels.
        return torch.relu(self.maxpool(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # [N, C, h, w]
        x = self.layer1(x)  # [N, C or 4C, h, w]
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)  # [N, feature_dim, h/8, w/8]
        return x.mean(dim=(2, 3))
