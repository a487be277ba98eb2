"""Any classification network of torchvision as an encoder, without its classifier.

The layers and their names are torchvision's. Some of them are replaced:

- The last linear layer, which is the classifier, becomes the identity. So the features are what the
  network gives its classifier: pooled as the network does it, with hidden layers that come before.
- Batch norms become this project's, with their own momentum and epsilon.
- Dropout and stochastic depth become the identity. BYOL's networks learn from two views of an
  image, and these are all the noise that they get.
- Activations that are layers no longer work in place, so that blocks can be recomputed. DenseNet,
  GoogLeNet and Inception also call relu in place themselves, on what a norm returns. That does no
  harm, because a norm's backward pass needs only its input.

Source: https://pytorch.org/vision/stable/models.html
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Annotated, Any

import torch
import torchvision
from annotated_types import Interval
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.ops import StochasticDepth

from engine.method.norm import BatchNorm
from shards.documents import shown
from shards.errors import InputError
from shards.fields import Rule, check_range

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MOST_PIXELS = 2**12
# Networks that take only multiples of a size in pixels, because they cut images into patches.
_MULTIPLES = {"vit_b_16": 16, "vit_l_16": 16, "vit_b_32": 32, "vit_l_32": 32, "vit_h_14": 14}
_MULTIPLES |= {"maxvit_t": 224}
# Networks whose convolutions and poolings leave nothing of images that the others take.
_LEAST = {"alexnet": 63, "inception_v3": 75}
_NEAR = 4  # names that a message proposes


@cache
def list_names() -> list[str]:
    """List the networks of torchvision that can be encoders."""
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if not _is_without_linear(name)]


def _is_without_linear(name: str) -> bool:
    return name.startswith("squeezenet")


def is_for_one_size(name: object) -> bool:
    """Return whether a network has an embedding for each position, and so takes one size only."""
    return isinstance(name, str) and name.startswith("vit_")


class TorchvisionName(Rule):
    """The value is the name of a network of torchvision that can be an encoder."""

    def check(self, name: str, value: Any) -> None:
        if value in list_names():
            return
        if isinstance(value, str) and _is_without_linear(value):
            raise InputError(
                f"{name} {shown(value)} cannot be an encoder: its classifier is a convolution "
                "before the pooling, and not a linear layer: choose another network"
            )
        near = difflib.get_close_matches(str(value)[:100].lower(), list_names(), _NEAR, 0.4)
        raise InputError(
            f"{name} must be a network of torchvision, not {shown(value)}: "
            + (f"near are {', '.join(near)}; " if near else "")
            + "torchvision.models.list_models(module=torchvision.models) lists all"
        )


@dataclass(frozen=True)
class TorchvisionConfig:
    """Choose a classification network of torchvision, whose classifier is left out."""

    name: Annotated[str, TorchvisionName()] = "resnet50"
    """Name of the network, such as mobilenet_v3_small, efficientnet_b0 or vit_b_16, as
    torchvision.models.list_models lists it. Its dropout and stochastic depth are off."""

    @property
    def fixed_size(self) -> bool:
        """Return whether the network's weights are for one size of images."""
        return is_for_one_size(self.name)

    def check_size(self, size: int, field: str = "views.size") -> None:
        """Raise InputError naming the `field` when the network cannot take images of `size`."""
        check_range(field, size, Interval(ge=_LEAST.get(self.name, 32), le=_MOST_PIXELS))
        step = _MULTIPLES.get(self.name, 1)
        if size % step:
            below = size // step * step
            near = [str(one) for one in (below, below + step) if 32 <= one <= _MOST_PIXELS]
            raise InputError(
                f"{field} must be a multiple of {step} for {self.name}, not {size}: the nearest "
                f"{'is' if len(near) == 1 else 'are'} {' and '.join(near)}"
            )

    def describe(self) -> str:
        """Return the network's name for people."""
        return f"torchvision's {self.name}"

    def build(self, views: int, size: int) -> "TorchvisionEncoder":
        """Build the encoder for images of `size` pixels. Its weights are those of seed 0."""
        return TorchvisionEncoder(self, views, size)


class TorchvisionEncoder(nn.Module):
    """A network of torchvision without its classifier: [N, 3, H, W] -> features [N, feature_dim].

    `network` has torchvision's names. `views` is the number of views that are stacked in a training
    batch (see BatchNorm). Some networks take only images of `size` pixels.
    """

    def __init__(self, config: TorchvisionConfig, views: int, size: int) -> None:
        super().__init__()
        self.config, self._views, self._size = config, views, size
        self.draw(0)

    def draw(self, seed: int) -> None:
        """Draw all weights by torchvision's own initialization, which depends on `seed` alone."""
        with _drawing(seed):
            network = build_stock(self.config.name, self._size)
        self.classifier_name, linear = find_classifier(network)
        self.feature_dim = linear.in_features
        network.set_submodule(self.classifier_name, nn.Identity())
        _replace(network, self._views)
        self.network = network

    def blocks(self) -> list[nn.Module]:
        """List the blocks, in order; they are compiled, sharded and recomputed one by one.

        A block is an outermost module of a class that occurs at least twice, other than torch's own
        layers and containers. A network without such modules is cut at its direct children.
        """
        numbers = Counter(type(module) for module in self.network.modules())
        found = list(_find_blocks(self.network, numbers))
        return found or [child for child in self.network.children() if _has_weights(child)]

    def facts(self) -> dict[str, str]:
        """Say in words which layers are left out, and what the blocks are."""
        kinds = Counter(type(block).__name__ for block in self.blocks())
        return {
            "left out, the last linear layer": self.classifier_name,
            "off": "dropout and stochastic depth",
            "blocks, by repeated classes": ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        }

    def stock_module(self) -> nn.Module:
        """Return the module whose state dict has torchvision's names."""
        return self.network

    def stock_state(self) -> dict[str, Tensor]:
        """Return parameters and buffers by torchvision's names."""
        return self.network.state_dict()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network(x)
        return features


def build_stock(name: str, size: int) -> nn.Module:
    """Build torchvision's network with its classifier and its own norms and initialization."""
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    with _RealNumbers() if name.startswith("regnet_") else nullcontext():
        network = builder(weights=None, **size_options(name, size))
    if isinstance(network, torchvision.models.MNASNet):
        # Its own method refuses a state dict that came without torch's hidden notes of versions.
        plain = MethodType(nn.Module._load_from_state_dict, network)
        setattr(network, "_load_from_state_dict", plain)  # noqa: B010
    return network


def size_options(name: str, size: int) -> dict[str, Any]:
    """Return the options that the network's builder needs."""
    if name.startswith("vit_"):
        return {"image_size": size}
    if name == "maxvit_t":
        return {"input_size": (size, size)}
    if name in ("googlenet", "inception_v3"):  # no further classifiers on inner layers
        return {"aux_logits": False, "init_weights": True}
    return {}


def find_classifier(network: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name and the module of the last linear layer, which is the classifier."""
    *_, last = ((n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear))
    return last


def _replace(network: nn.Module, views: int) -> None:
    """Replace norms and noise, and stop working in place."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, _own_norm(module, views))
        elif isinstance(module, nn.Dropout | StochasticDepth):
            network.set_submodule(name, nn.Identity())
        elif hasattr(module, "inplace"):
            module.inplace = False


def _own_norm(norm: nn.BatchNorm2d, views: int) -> BatchNorm:
    momentum = 0.1 if norm.momentum is None else norm.momentum
    own = BatchNorm(norm.num_features, views, momentum, norm.eps)
    own.weight, own.bias = norm.weight, norm.bias
    return own


def _find_blocks(module: nn.Module, numbers: Counter[type]) -> Iterator[nn.Module]:
    for child in module.children():
        if not _has_weights(child) or not any(True for _ in child.children()):
            continue
        kind = type(child)
        own = not kind.__module__.startswith("torch.nn.") and not isinstance(child, BatchNorm)
        if own and kind not in _CONTAINERS and numbers[kind] > 1:
            yield child
        else:
            yield from _find_blocks(child, numbers)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Let torch's own generator begin at `seed`, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class _RealNumbers(TorchFunctionMode):
    """Keep tensors of numbers real where `torch.device("meta")` makes all others.

    RegNets compute their widths by such tensors. Layers pass a device, if only None, for theirs,
    so that these are made as ever.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        real = {"device": "cpu"} if func in (torch.arange, torch.tensor) else {}
        return func(*args, **real | (kwargs or {}))
