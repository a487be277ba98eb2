"""Build the encoder's network from torchvision's parts, for users who do not have this package."""

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from engine.method.encoders import BackboneConfig
from engine.method.resnet import ResNetConfig
from engine.method.torchvision_encoder import (
    TorchvisionConfig,
    build_stock,
    find_classifier,
    size_options,
)

NAMED = (18, 34, 50, 101, 152)
"""Depths for which torchvision has a function."""


def stock_network(config: BackboneConfig, size: int, classes: int = 0) -> nn.Module:
    """Build torchvision's network: [N, 3, H, W] -> features [N, F], or logits [N, classes].

    Its `state_dict` has the keys and shapes of the encoder's `stock_state`. `size` is the side of
    the images, which some networks need.
    """
    network: nn.Module
    if isinstance(config, TorchvisionConfig):
        network = build_stock(config.name, size)
        name, linear = find_classifier(network)
        features = linear.in_features
    else:
        network, name = stock_resnet(config), "fc"
        features = config.channels[3] * _block(config).expansion
    network.set_submodule(name, nn.Linear(features, classes) if classes else nn.Identity())
    return network


def stock_resnet(config: ResNetConfig) -> torchvision.models.ResNet:
    """Build torchvision's ResNet without a classifier: [N, 3, H, W] -> features [N, feature_dim].

    Its `state_dict` has the keys and shapes of that of `ResNet(config)`. Its weights are drawn by
    torch's defaults from the global generator.
    """
    block, blocks, channels = _block(config), list(config.blocks), config.channels
    c1 = channels[0]
    model = torchvision.models.ResNet(block, blocks)
    if config.stem == "cifar":
        model.conv1 = nn.Conv2d(3, c1, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    else:
        model.conv1 = nn.Conv2d(3, c1, 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(c1)
    model.inplanes = c1  # input channels of the next layer; each call below updates them
    model.layer1 = model._make_layer(block, channels[0], blocks[0])
    model.layer2 = model._make_layer(block, channels[1], blocks[1], stride=2)
    model.layer3 = model._make_layer(block, channels[2], blocks[2], stride=2)
    model.layer4 = model._make_layer(block, channels[3], blocks[3], stride=2)
    if config.projection_shortcut and block is BasicBlock:  # bottlenecks have one in any case
        model.layer1[0].downsample = nn.Sequential(
            nn.Conv2d(c1, c1, 1, bias=False), nn.BatchNorm2d(c1)
        )
    model.fc = nn.Identity()
    return model


def recipe_lines(config: BackboneConfig, size: int = 224, classes: int = 0) -> list[str]:
    """Return lines of Python that build `stock_network(config, size, classes)` as `model`."""
    if isinstance(config, TorchvisionConfig):
        return _network_lines(config.name, size, classes)
    return _resnet_lines(config, classes)


def _network_lines(name: str, size: int, classes: int) -> list[str]:
    with torch.device("meta"):
        network = build_stock(name, size)
    place, linear = find_classifier(network)
    options = ", ".join(f"{key}={value!r}" for key, value in size_options(name, size).items())
    path = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in place.split("."))
    end = f"Linear({linear.in_features}, {classes})" if classes else "Identity()"
    lines = ["import torch", "import torchvision", ""]
    lines.append(f"model = torchvision.models.{name}({options})")
    lines.append(f"model{path} = torch.nn.{end}")
    if isinstance(network, torchvision.models.MNASNet):
        lines.insert(0, "from types import MethodType\n")
        lines.append("# Its own method wants torch's notes of versions, which files may not have.")
        lines.append("plain = torch.nn.Module._load_from_state_dict")
        lines.append("model._load_from_state_dict = MethodType(plain, model)")
    return lines


def _resnet_lines(config: ResNetConfig, classes: int) -> list[str]:
    block, blocks, channels = _block(config), list(config.blocks), config.channels
    c1, name = channels[0], block.__name__
    named, resized = config.depth in NAMED, config.width != 1

    lines = ["import torch", "import torchvision"]
    if resized or not named:
        lines.append(f"from torchvision.models.resnet import {name}")
    lines.append("")
    made = f"resnet{config.depth}()" if named else f"ResNet({name}, {blocks})"
    lines.append(f"model = torchvision.models.{made}")
    if config.stem == "cifar":
        lines.append(f"model.conv1 = torch.nn.Conv2d(3, {c1}, 3, padding=1, bias=False)")
        lines.append("model.maxpool = torch.nn.Identity()")
    elif resized:
        lines.append(f"model.conv1 = torch.nn.Conv2d(3, {c1}, 7, stride=2, padding=3, bias=False)")
    if resized:
        lines.append(f"model.bn1 = torch.nn.BatchNorm2d({c1})")
        lines.append(f"model.inplanes = {c1}")
        for i, (planes, count) in enumerate(zip(channels, blocks, strict=True), start=1):
            stride = ", stride=2" if i > 1 else ""
            lines.append(f"model.layer{i} = model._make_layer({name}, {planes}, {count}{stride})")
    if config.projection_shortcut and block is BasicBlock:
        lines += [
            "model.layer1[0].downsample = torch.nn.Sequential(",
            f"    torch.nn.Conv2d({c1}, {c1}, 1, bias=False), torch.nn.BatchNorm2d({c1})",
            ")",
        ]
    features = channels[3] * block.expansion
    end = f"Linear({features}, {classes})" if classes else "Identity()"
    lines.append(f"model.fc = torch.nn.{end}")
    return lines


def _block(config: ResNetConfig) -> type[BasicBlock] | type[Bottleneck]:
    block: type[BasicBlock] | type[Bottleneck] = Bottleneck if config.bottleneck else BasicBlock
    return block
