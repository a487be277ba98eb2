"""The encoders that a recipe can choose among."""

from torch import Generator

from engine.method.initialization import Initialization, initialize
from engine.method.resnet import ResNet, ResNetConfig
from engine.method.torchvision_encoder import TorchvisionConfig, TorchvisionEncoder

Encoder = ResNet | TorchvisionEncoder
BackboneConfig = ResNetConfig | TorchvisionConfig
ENCODERS: dict[str, type[ResNetConfig] | type[TorchvisionConfig]] = {
    "ResNetConfig": ResNetConfig,
    "TorchvisionConfig": TorchvisionConfig,
}
"""The configs of encoders by the names that recipe.json has for them."""


def initialize_encoder(
    encoder: Encoder, generator: Generator, rule: Initialization = "official"
) -> None:
    """Draw all weights of an encoder by a rule.

    By the official one a ResNet is drawn as the official networks are, and a network of torchvision
    as torchvision draws it, from the seed of the `generator`. The other rules draw convolutions and
    linear layers, whatever the encoder.
    """
    if isinstance(encoder, TorchvisionEncoder):
        encoder.draw(generator.initial_seed())
        if rule == "official":
            return
    initialize(encoder, generator, rule)
