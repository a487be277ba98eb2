"""The method: an online network learns to predict a slowly moving target's view of an image.

Both views of a batch of B images go through one forward, stacked: [V*B, 3, H, W] with V = 2, view 1
first. Nothing here knows how many processes there are.

Source: BYOL (arXiv 2006.07733), "Description of BYOL" and figure 2.
"""

from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from annotated_types import Interval
from torch import Generator, Tensor, nn

from engine.method.norm import BatchNorm
from engine.method.resnet import ResNet, ResNetConfig, initialize

VIEWS = 2


@dataclass(frozen=True)
class BYOLConfig:
    """Shapes of the networks; the defaults are the paper's."""

    encoder: ResNetConfig = field(default_factory=ResNetConfig)
    """The network whose features the training is for."""

    hidden: Annotated[int, Interval(ge=1, le=2**20)] = 4096
    """Width of the hidden layer of the projector and of the predictor."""

    projection: Annotated[int, Interval(ge=1, le=2**20)] = 256
    """Size of the projections that the loss compares."""


class OnlineOutput(NamedTuple):
    """What a step needs of the online network."""

    features: Tensor  # [V*B, F], detached
    prediction: Tensor  # [V*B, D]
    logits: Tensor | None  # [B, classes], of view 1


def mlp(inputs: int, hidden: int, outputs: int, views: int) -> nn.Sequential:
    """Projector or predictor, [V*B, inputs] -> [V*B, outputs]. Paper: "Architecture"."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        BatchNorm(hidden, views),
        nn.ReLU(),
        nn.Linear(hidden, outputs, bias=False),
    )


class Online(nn.Module):
    """The network that is trained, and a linear classifier that watches its features.

    The classifier sees detached features, so it measures the encoder without teaching it.
    `classes` 0 leaves it out.
    """

    def __init__(self, config: BYOLConfig, classes: int) -> None:
        super().__init__()
        self.encoder = ResNet(config.encoder, VIEWS)
        features = self.encoder.feature_dim
        self.projector = mlp(features, config.hidden, config.projection, VIEWS)
        self.predictor = mlp(config.projection, config.hidden, config.projection, VIEWS)
        self.classifier = nn.Linear(features, classes) if classes else None

    def forward(self, images: Tensor) -> OnlineOutput:
        """Images [V*B, 3, H, W] -> features, prediction and logits."""
        features = self.encoder(images)  # [V*B, F]
        prediction = self.predictor(self.projector(features))  # [V*B, D]
        features = features.detach()
        first_view = features.chunk(VIEWS)[0]  # [B, F]
        logits = None if self.classifier is None else self.classifier(first_view)
        return OnlineOutput(features, prediction, logits)


class Target(nn.Module):
    """The network that is predicted. It stays in train mode and never needs a gradient."""

    def __init__(self, config: BYOLConfig) -> None:
        super().__init__()
        self.encoder = ResNet(config.encoder, VIEWS)
        self.projector = mlp(self.encoder.feature_dim, config.hidden, config.projection, VIEWS)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [V*B, 3, H, W] -> projection [V*B, D]."""
        projection: Tensor = self.projector(self.encoder(images))
        return projection


def build(config: BYOLConfig, classes: int, seed: int) -> tuple[Online, Target]:
    """Both networks on the CPU, initialized independently of each other, as the official ones."""
    online, target = Online(config, classes), Target(config)
    initialize(online, Generator().manual_seed(2 * seed))
    initialize(target, Generator().manual_seed(2 * seed + 1))
    return online, target


def _normalize(x: Tensor) -> Tensor:
    # The floor is on the squared norm, as in the official code; F.normalize has it on the norm.
    square = x.square().sum(dim=-1, keepdim=True)  # [N, 1]
    return x * square.clamp(min=1e-12).rsqrt()


def regression_loss(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance of the normalized rows, 0 to 4: [N, D], [N, D] -> [N]. Equation 2.

    Computed in float32 at least.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (_normalize(x.to(dtype)) - _normalize(y.to(dtype))).square().sum(dim=-1)


def byol_loss(prediction: Tensor, projection: Tensor) -> Tensor:
    """Each row's loss, both directions, 0 to 8: [2B, D], [2B, D] -> [B].

    The online prediction of either view is held against the target's projection of the other one;
    no gradient goes to the target.
    """
    q1, q2 = prediction.chunk(VIEWS)  # [B, D] each
    z1, z2 = projection.detach().chunk(VIEWS)
    return regression_loss(q1, z2) + regression_loss(q2, z1)


def paired(target: Target, online: Online) -> tuple[list[Tensor], list[Tensor]]:
    """Every parameter of the target, and the online network's of the same name."""
    source = dict(online.named_parameters())
    moved = dict(target.named_parameters())
    return list(moved.values()), [source[name] for name in moved]


@torch.no_grad()
def update_target(target: list[Tensor], online: list[Tensor], step: Tensor) -> None:
    """target += step * (online - target) for every parameter. Equation 1, with step = 1 - tau.

    `step` [] is on the parameters' device, so that it can be 0 where the online network's own step
    was skipped. Running statistics are left alone: the target has those of its own forwards.
    """
    difference = torch._foreach_sub(online, target)
    torch._foreach_mul_(difference, step)
    torch._foreach_add_(target, difference)
