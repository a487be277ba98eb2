"""The encoders that a recipe can choose among."""

from torch import Generator

from engine.method.resnet import ResNet, ResNetConfig, initialize
from engine.method.torchvision_encoder import TorchvisionConfig, TorchvisionEncoder

Encoder = ResNet | TorchvisionEncoder
BackboneConfig = ResNetConfig | TorchvisionConfig
ENCODERS: dict[str, type[ResNetConfig] | type[TorchvisionConfig]] = {
    "ResNetConfig": ResNetConfig,
    "TorchvisionConfig": TorchvisionConfig,
}
"""The configs of encoders by the names that recipe.json has for them."""


def initialize_encoder(encoder: Encoder, generator: Generator) -> None:
    """Draw all weights of an encoder as its kind is initialized.

    A ResNet is drawn as the official networks are. A network of torchvision is drawn as torchvision
    does it, from the seed of the `generator`.
    """
    if isinstance(encoder, TorchvisionEncoder):
        encoder.draw(generator.initial_seed())
    else:
        initialize(encoder, generator)
