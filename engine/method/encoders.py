"""The encoders that a recipe can choose among."""

from typing import Literal

from torch import Generator, nn

from engine.method.initialization import Initialization, initialize
from engine.method.resnet import Bottleneck, ResNet, ResNetConfig
from engine.method.torchvision_encoder import TorchvisionConfig, TorchvisionEncoder

Encoder = ResNet | TorchvisionEncoder
BackboneConfig = ResNetConfig | TorchvisionConfig
LastGamma = Literal["zero", "one"]
ENCODERS: dict[str, type[ResNetConfig] | type[TorchvisionConfig]] = {
    "ResNetConfig": ResNetConfig,
    "TorchvisionConfig": TorchvisionConfig,
}
"""The configs of encoders by the names that recipe.json has for them."""


def initialize_encoder(
    encoder: Encoder,
    generator: Generator,
    rule: Initialization = "official",
    last_gamma: LastGamma = "zero",
) -> None:
    """Draw all weights of an encoder by a rule.

    By the official one a ResNet is drawn as the official networks are, and a network of torchvision
    as torchvision draws it, from the seed of the `generator`. The other rules draw convolutions and
    linear layers, whatever the encoder. `last_gamma` is what the scale of the last norm of each
    bottleneck begins as.
    """
    if isinstance(encoder, TorchvisionEncoder):
        encoder.draw(generator.initial_seed())
        if rule == "official":
            return
    initialize(encoder, generator, rule)
    if last_gamma == "one":
        for module in encoder.modules():
            if isinstance(module, Bottleneck):
                nn.init.ones_(module.bn3.weight)
