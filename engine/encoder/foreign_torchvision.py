"""Match checkpoints that hold any other network of torchvision, by torchvision's names."""

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torchvision
from torch import Size, Tensor

from engine.encoder import foreign
from engine.encoder.foreign import Foreign, Side
from engine.encoder.foreign_shapes import COUNTER
from engine.method.encoders import BackboneConfig
from engine.method.torchvision_encoder import TorchvisionConfig, list_names
from shards.errors import InputError

_USUAL_SIZE = 224
# The module of torchvision that a network comes from, and a tensor of every network of it.
_MARKS = {
    "alexnet": "features.0.weight",
    "convnext": "features.1.0.layer_scale",
    "densenet": "features.denseblock1.denselayer1.norm1.weight",
    "efficientnet": "features.1.0.block.0.0.weight",
    "googlenet": "inception3a.branch1.conv.weight",
    "inception": "Conv2d_1a_3x3.conv.weight",
    "maxvit": "blocks.0.layers.0.layers.MBconv.layers.pre_norm.weight",
    "mnasnet": "layers.8.0.layers.0.weight",
    "mobilenetv2": "features.1.conv.0.0.weight",
    "mobilenetv3": "features.1.block.0.0.weight",
    "regnet": "trunk_output.block1.block1-0.proj.0.weight",
    "resnet": "layer1.0.conv1.weight",
    "shufflenetv2": "stage2.0.branch1.0.weight",
    "swin_transformer": "features.1.0.attn.relative_position_bias_table",
    "vgg": "features.0.weight",
    "vision_transformer": "encoder.pos_embedding",
}
_POSITIONS = "encoder.pos_embedding"  # [1, patches + 1, D]


class ForeignNetwork(NamedTuple):
    """A checkpoint's encoder, and the side of the images that it is for."""

    encoder: Foreign
    size: int


def match_any(
    tensors: dict[str, Tensor], network: Side, place: str, prefix: str | None
) -> ForeignNetwork:
    """Find the ResNet in a checkpoint, or else any other network of torchvision.

    Raises InputError as `foreign.match` does.
    """
    try:
        return ForeignNetwork(foreign.match(tensors, network, place, prefix), _USUAL_SIZE)
    except InputError as error:
        refused = error
    names = [foreign.plain(name) for name in tensors]
    for name in list_names():
        if not any(one.endswith(_mark(name)) for one in names):
            continue
        config = TorchvisionConfig(name)
        size = _find_size(config, tensors)
        if size is not None and find_prefixes(config, size, tensors):
            found = match_torchvision(tensors, config, size, network, place, prefix)
            return ForeignNetwork(found, size)
    raise InputError(f"{refused}; nor does it hold another network of torchvision by its names")


def match_torchvision(
    tensors: dict[str, Tensor],
    config: TorchvisionConfig,
    size: int,
    network: Side,
    place: str,
    prefix: str | None = None,
    flag: str = "--prefix",
) -> Foreign:
    """Find a network of torchvision in a checkpoint, by torchvision's names.

    The arguments are those of `foreign.match`, with the `config` of the network and the side of the
    images that it is for.

    Raises InputError when the checkpoint has no such network, or several.
    """
    there = find_prefixes(config, size, tensors)
    if not there:
        raise InputError(_describe_misfit(config, size, tensors, place))
    chosen = foreign.choose(there, network, place, prefix, flag)
    plain = {foreign.plain(name): name for name in tensors}
    with torch.device("meta"):
        kept = config.build(1, size).stock_state()
    # Tables of positions are constants of the network.
    wanted = [n for n, v in kept.items() if v.is_floating_point() or COUNTER in n]
    names = {ours: plain[chosen + ours] for ours in wanted if chosen + ours in plain}
    state = foreign.read_state(tensors, wanted, names, place)
    how = f"by name{f' under {chosen!r}' if chosen else ''}"
    report = foreign.describe_match(tensors, config.describe(), how, names)
    return Foreign(config, state, report)


def find_prefixes(config: BackboneConfig, size: int, tensors: Mapping[str, Tensor]) -> list[str]:
    """List the prefixes under which a checkpoint has all weights of a network of torchvision."""
    assert isinstance(config, TorchvisionConfig)
    wanted = _shapes(config.name, size)
    found = {foreign.plain(name): value.shape for name, value in tensors.items()}
    return [
        prefix
        for prefix in _list_prefixes(found, next(iter(wanted)))
        if all(found.get(prefix + name) == shape for name, shape in wanted.items())
    ]


def find_larger(
    config: TorchvisionConfig, size: int, tensors: Mapping[str, Tensor]
) -> TorchvisionConfig | None:
    """Return the larger network of torchvision that a checkpoint holds, of which this is a part.

    All tensors of a ResNet-18, for instance, are also those of a ResNet-34.
    """
    own = _shapes(config.name, size).items()
    for name in list_names():
        if name == config.name or _mark(name) != _mark(config.name):
            continue
        other = TorchvisionConfig(name)
        if _shapes(name, size).items() > own and find_prefixes(other, size, tensors):
            return other
    return None


def _list_prefixes(names: Mapping[str, object], first: str) -> list[str]:
    """List what stands before the name of a network's first tensor."""
    prefixes = (name.removesuffix(first) for name in names if name.endswith(first))
    found = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    return found[: foreign.MOST_NETWORKS]


def _describe_misfit(
    config: TorchvisionConfig, size: int, tensors: Mapping[str, Tensor], place: str
) -> str:
    wanted = _shapes(config.name, size)
    found = {foreign.plain(name): value.shape for name, value in tensors.items()}
    told = f"{place}: does not hold {config.describe()} by its names"
    prefixes = _list_prefixes(found, next(iter(wanted)))
    if not prefixes:
        return f"{told}: it has no tensor {next(iter(wanted))}"
    wrong = [
        name
        if prefixes[0] + name not in found
        else f"{name}: {list(found[prefixes[0] + name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if found.get(prefixes[0] + name) != shape
    ]
    text = f"{told}: {len(wrong)} tensors are missing or of another shape ({', '.join(wrong[:3])})"
    return text + f"; views.size {size} decides the last one" * (wrong[0][:21] == _POSITIONS)


@functools.cache
def _shapes(name: str, size: int) -> dict[str, Size]:
    """Return the shapes of a network's floating-point tensors by torchvision's names."""
    with torch.device("meta"):
        state = TorchvisionConfig(name).build(1, size).stock_state()
    return {name: value.shape for name, value in state.items() if value.is_floating_point()}


def _mark(name: str) -> str:
    module = torchvision.models.get_model_builder(name).__module__
    return _MARKS.get(module.rpartition(".")[2], "")


def _find_size(config: TorchvisionConfig, tensors: Mapping[str, Tensor]) -> int | None:
    """Return the side of the images that a network's weights are for; None where none fits."""
    if not config.fixed_size:
        return _USUAL_SIZE
    patch = int(re.sub(r".*_", "", config.name))
    for name, value in tensors.items():
        if foreign.plain(name).endswith(_POSITIONS) and value.ndim == 3:
            side = round(max(0, value.shape[1] - 1) ** 0.5)
            size = side * patch
            fits = side**2 + 1 == value.shape[1] and 32 <= size <= 2**12
            return size if fits else None
    return None
