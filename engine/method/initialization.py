"""Draw the weights that a training begins with.

Source: the official implementation of BYOL (arXiv 2006.07733), which has Haiku's default; the other
rules are torch's (torch.nn.init).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Generator, Tensor, nn

Initialization = Literal[
    "official",
    "xavier_uniform",
    "xavier_normal",
    "kaiming_uniform",
    "kaiming_normal",
    "orthogonal",
]


def initialize(module: nn.Module, generator: Generator, rule: Initialization = "official") -> None:
    """Draw all convolution and linear weights of `module`, and set their biases to zero.

    All other parameters stay as they are. `generator` must be on the weights' device.
    """
    draw = _RULES[rule]
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            draw(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _draw_official(weight: Tensor, *, generator: Generator) -> None:
    """Draw from a normal distribution of deviation 1/sqrt(fan in), cut at two deviations.

    This is the default of the official networks (Haiku's), which does not correct the deviation for
    the truncation.
    """
    std = weight[0].numel() ** -0.5
    nn.init.trunc_normal_(weight, 0, std, -2 * std, 2 * std, generator)


# Kaiming's rules are those for ReLU, which follows almost every layer here.
_RULES: dict[Initialization, Callable[..., object]] = {
    "official": _draw_official,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "kaiming_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "orthogonal": nn.init.orthogonal_,
}
