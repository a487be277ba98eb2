"""Describe a network in `config.json`, as the Hugging Face Hub and timm read it."""

from typing import Any

from torch import nn

from engine.encoder.source import Source
from engine.encoder.torchvision_twin import recipe_lines
from engine.method.augment import MEAN, STD
from engine.method.encoders import BackboneConfig, Encoder
from engine.method.resnet import ResNetConfig

CONFIG = "config.json"
TIMM_DEPTHS = (18, 34, 50, 101, 152, 200)


def timm_name(config: BackboneConfig) -> str:
    """Return timm's name for the same network with the same keys, or "" when timm has none."""
    if not isinstance(config, ResNetConfig):
        return ""
    same = config.stem == "imagenet" and config.width == 1 and not config.projection_shortcut
    return f"resnet{config.depth}" if same and config.depth in TIMM_DEPTHS else ""


def describe_network(
    source: Source, weights: str, encoder: Encoder, classes: list[str], count: int
) -> dict[str, Any]:
    """Return the content of `config.json` for a file of weights in the same folder.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` builds the network of it, where timm
    has this network. Elsewhere the lines under "build" do.

    Args:
        weights: The name of the file of weights.
        encoder: The network.
        classes: The names of the classes; empty when they are not known.
        count: The number of the classes; 0 for an encoder without a classifier.
    """
    config = source.config
    document: dict[str, Any] = {
        "architecture": timm_name(config) or _describe(config),
        "num_classes": count,
        "num_features": encoder.feature_dim,
        "global_pool": "avg",
        "pretrained_cfg": {
            "hf_hub_filename": weights,
            "custom_load": False,
            "input_size": [3, source.size, source.size],
            "fixed_input_size": config.fixed_size,
            "interpolation": "bicubic",
            "crop_pct": source.crop,
            "crop_mode": "center",
            "mean": MEAN,
            "std": STD,
            "num_classes": count,
            "pool_size": [-(-source.size // 32)] * 2,
            "first_conv": _first_convolution(encoder),
            "classifier": encoder.classifier_name,
        },
        "antialias": False,
        "weights": weights,
        "build": recipe_lines(config, source.size, count),
    }
    if classes:
        document["label_names"] = classes
    return document


def _describe(config: BackboneConfig) -> str:
    if isinstance(config, ResNetConfig):
        return f"torchvision's ResNet, depth {config.depth}"
    return config.describe()


def _first_convolution(encoder: Encoder) -> str:
    names = (n for n, m in encoder.stock_module().named_modules() if isinstance(m, nn.Conv2d))
    return str(next(names))
