"""BYOL: an online network learns to predict a slowly moving target's projection of another view.

Both views of a batch of B images go through one forward pass. They are stacked as [V*B, 3, H, W]
with V = 2, view 1 first. Nothing here depends on the number of processes.

Source: BYOL (arXiv 2006.07733), "Description of BYOL" and figure 2.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Interval
from torch import Generator, Tensor, nn

from engine.method.encoders import LastGamma, initialize_encoder
from engine.method.initialization import Initialization, initialize
from engine.method.norm import BatchNorm
from engine.method.resnet import ResNetConfig
from engine.method.torchvision_encoder import TorchvisionConfig
from shards.fields import Operation

VIEWS = 2


@dataclass(frozen=True)
class BYOLConfig:
    """Configure the shapes of the networks; the defaults are the paper's."""

    encoder: ResNetConfig | TorchvisionConfig = field(default_factory=ResNetConfig)
    """The network whose features the training is for."""

    # With one number the direction of a prediction is its sign, and its gradient is exactly zero.
    hidden: Annotated[int, Interval(ge=2, le=2**20)] = 4096
    """Width of the hidden layer of the projector and of the predictor."""

    projection: Annotated[int, Interval(ge=2, le=2**20)] = 256
    """Size of the projections that the loss compares."""

    initialization: Initialization = "official"
    """How the weights of convolutions and linear layers are drawn. official is a truncated normal
    distribution of deviation 1/sqrt(fan in), and the others are the rules of torch.nn.init. Biases
    begin at zero. For a network of torchvision, official is torchvision's own rule."""

    target_start: Literal["drawn", "copy"] = "drawn"
    """What the target network begins as. drawn means weights of its own, as in the official code.
    copy means those of the online network, as in most other implementations, which gains a little
    in a training of a few epochs."""

    last_gamma: LastGamma = "zero"
    """What the scale of the last norm of each bottleneck begins as. zero is the official code's.
    one is what the paper's figures were obtained with, and a little better for very large networks,
    as its authors note. Basic blocks and networks of torchvision have their own in any case."""

    start: Operation[str] = ""
    """URL of the weights that a new run starts from: of a run, of one of its checkpoints, or of a
    third-party checkpoint file of the encoder. By default all weights are drawn. A run goes on
    without the file, and with another one only if its weights are the same."""

    start_prefix: Operation[str | None] = None
    """What stands before conv1.weight in the encoder's tensor names in the file of model.start. It
    is needed only when the file holds several encoders, and the error message then lists them."""


class OnlineOutput(NamedTuple):
    """Hold the outputs of the online network that a step needs."""

    features: Tensor  # [V*B, F], detached
    prediction: Tensor  # [V*B, D]
    logits: Tensor | None  # [B, classes], of view 1


def mlp(inputs: int, hidden: int, outputs: int, views: int) -> nn.Sequential:
    """Build a projector or predictor, [V*B, inputs] -> [V*B, outputs]. Paper: "Architecture"."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        BatchNorm(hidden, views),
        nn.ReLU(),
        nn.Linear(hidden, outputs, bias=False),
    )


class Online(nn.Module):
    """The online network, which is trained, with a linear classifier on its features.

    The classifier sees detached features, so it measures the encoder without training it. There is
    no classifier when `classes` is 0. `size` is the side of the images, which some encoders need.
    """

    def __init__(self, config: BYOLConfig, classes: int, size: int = 224) -> None:
        super().__init__()
        self.encoder = config.encoder.build(VIEWS, size)
        features = self.encoder.feature_dim
        self.projector = mlp(features, config.hidden, config.projection, VIEWS)
        self.predictor = mlp(config.projection, config.hidden, config.projection, VIEWS)
        self.classifier = nn.Linear(features, classes) if classes else None

    def forward(self, images: Tensor) -> OnlineOutput:
        """Compute features, prediction and logits of the images [V*B, 3, H, W]."""
        features = self.encoder(images)  # [V*B, F]
        prediction = self.predictor(self.projector(features))  # [V*B, D]
        features = features.detach()
        first_view = features.chunk(VIEWS)[0]  # [B, F]
        logits = None if self.classifier is None else self.classifier(first_view)
        return OnlineOutput(features, prediction, logits)


class Target(nn.Module):
    """The target network, whose projections are predicted.

    It stays in training mode and never needs a gradient.
    """

    def __init__(self, config: BYOLConfig, size: int = 224) -> None:
        super().__init__()
        self.encoder = config.encoder.build(VIEWS, size)
        self.projector = mlp(self.encoder.feature_dim, config.hidden, config.projection, VIEWS)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the projections [V*B, D] of the images [V*B, 3, H, W]."""
        projection: Tensor = self.projector(self.encoder(images))
        return projection


def build(config: BYOLConfig, classes: int, seed: int, size: int = 224) -> tuple[Online, Target]:
    """Build both networks on the CPU and initialize them, by default each on its own."""
    online, target = Online(config, classes, size), Target(config, size)
    networks: list[Online | Target] = [online, target]
    for number, network in enumerate(networks, start=2 * seed):
        generator = Generator().manual_seed(number)
        encoder, *heads = network.children()
        assert encoder is network.encoder
        initialize_encoder(network.encoder, generator, config.initialization, config.last_gamma)
        for head in heads:
            initialize(head, generator, config.initialization)
    if config.target_start == "copy":
        own = target.state_dict()
        target.load_state_dict({name: online.state_dict()[name] for name in own})
    return online, target


def _normalize(x: Tensor) -> Tensor:
    # The official code bounds the squared norm from below; F.normalize bounds the norm.
    square = x.square().sum(dim=-1, keepdim=True)  # [N, 1]
    return x * square.clamp(min=1e-12).rsqrt()


def regression_loss(x: Tensor, y: Tensor) -> Tensor:
    """Compute the squared distance of the normalized rows, 0 to 4: [N, D], [N, D] -> [N].

    It is equation 2 of the paper, computed in float32 or wider.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (_normalize(x.to(dtype)) - _normalize(y.to(dtype))).square().sum(dim=-1)


def byol_loss(prediction: Tensor, projection: Tensor) -> Tensor:
    """Compute each image's loss, summed over both directions, 0 to 8: [2B, D], [2B, D] -> [B].

    The online prediction of each view is compared with the target's projection of the other view.
    No gradient reaches the target.
    """
    q1, q2 = prediction.chunk(VIEWS)  # [B, D] each
    z1, z2 = projection.detach().chunk(VIEWS)
    return regression_loss(q1, z2) + regression_loss(q2, z1)


def pair_parameters(target: Target, online: Online) -> tuple[list[Tensor], list[Tensor]]:
    """List all parameters of the target, and those of the online network by the same names."""
    source = dict(online.named_parameters())
    moved = dict(target.named_parameters())
    return list(moved.values()), [source[name] for name in moved]


@torch.no_grad()
def update_target(target: list[Tensor], online: list[Tensor], fraction: Tensor) -> None:
    """Move the target in place: target += fraction * (online - target) for every parameter.

    It is equation 1 of the paper with fraction = 1 - tau. The running statistics are not averaged,
    because the target keeps those of its own forward passes.

    Args:
        target: The parameters to move.
        online: The parameters of the online network, in the same order.
        fraction: [] on the parameters' device, 0 when the online network's step was skipped.
    """
    difference = torch._foreach_sub(online, target)
    torch._foreach_mul_(difference, fraction)
    torch._foreach_add_(target, difference)
