"""An encoder with the linear classifier that an evaluation learned on its features."""

import json
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from engine.encoder.foreign_files import read_tensors
from engine.encoder.source import Source
from engine.method.encoders import BackboneConfig, Encoder
from engine.method.resnet import ResNet, ResNetConfig
from engine.method.torchvision_encoder import TorchvisionConfig, TorchvisionEncoder
from shards.documents import check, parse_json
from shards.errors import InputError
from shards.storage import files
from shards.storage.misplaced import find_near

_HEADS = ("head.safetensors", "model.safetensors")  # in the folder of an evaluation's results


class Classifier(ResNet):
    """An encoder and a linear classifier: [N, 3, H, W] -> [N, C]. Its names are torchvision's."""

    def __init__(self, config: ResNetConfig, classes: int) -> None:
        super().__init__(config, views=1)
        self.fc = nn.Linear(self.feature_dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(super().forward(x))
        return logits


class TorchvisionClassifier(TorchvisionEncoder):
    """A network of torchvision whose own classifier's place has one of C classes."""

    def __init__(self, config: TorchvisionConfig, size: int, classes: int) -> None:
        super().__init__(config, 1, size)
        self.network.set_submodule(self.classifier_name, nn.Linear(self.feature_dim, classes))


AnyClassifier = Classifier | TorchvisionClassifier


def build_classifier(config: BackboneConfig, size: int, classes: int) -> AnyClassifier:
    """Build an encoder with a linear classifier, for images of `size` pixels."""
    if isinstance(config, TorchvisionConfig):
        return TorchvisionClassifier(config, size, classes)
    return Classifier(config, classes)


def count_classes(encoder: Encoder) -> int:
    """Return the number of classes of a classifier; 0 for an encoder without one."""
    weight = encoder.stock_state().get(f"{encoder.classifier_name}.weight")
    return 0 if weight is None else len(weight)


class Head(NamedTuple):
    """A linear classifier that was read from a file."""

    weight: Tensor  # [C, F]
    bias: Tensor  # [C]
    classes: list[str]  # the names of the C classes; empty where the file has none
    learned_on: str  # the name of the encoder's weights; "" where the file does not say


def name_weights(source: Source) -> str:
    """Return the name of an encoder's weights, such as `online 0123456789abcdef`."""
    return f"{source.network} {source.digest}"


def save_head(
    tensors: dict[str, Tensor], classes: list[str], learned_on: str = "", name: str = "fc"
) -> bytes:
    """Return the content of a safetensors file with these tensors and the names of the classes.

    Args:
        learned_on: The name of the weights of the encoder, which stayed as they were.
        name: The name of the linear classifier among the tensors.
    """
    facts = {"format": "pt", "classes": json.dumps(classes)}
    facts |= {"learned_on": learned_on} if learned_on else {}
    facts |= {"classifier": name} if name != "fc" else {}
    # The library writes metadata in a random order, and equal heads shall be equal files.
    content = save(tensors)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": facts} | json.loads(content[8:start])).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[start:]


def read_head(url: str) -> Head:
    """Read a linear classifier. Raises InputError when the file has none or is damaged."""
    place = f"--head {files.redact(url)}"
    files.check(url, "--head")
    if there := files.list_names(url):
        near = next((files.join(url, one) for one in _HEADS if one in there), "")
        near = near or next((files.join(one, _HEADS[0]) for one in find_near(url, _HEADS[0])), "")
        advice = f"give {files.redact(near)}" if near else f"give the {_HEADS[0]} of an evaluation"
        raise InputError(f"{place}: is a folder: {advice}")
    try:
        tensors = read_tensors(url)
        facts = _read_metadata(files.read(url))
        place_there = facts.get("classifier", "fc")
        weight, bias = tensors[f"{place_there}.weight"], tensors[f"{place_there}.bias"]
        names = facts.get("classes", "[]")
        classes: list[str] = check(list[str], parse_json(names.encode()), "classes")
    except KeyError as missing:
        raise InputError(
            f"{place}: has no {missing.args[0]}: give the head.safetensors of a linear evaluation, "
            "or the model.safetensors of a fine-tuning"
        ) from None
    except InputError as error:
        raise InputError(f"--head {error}") from None
    except ValueError as error:
        raise InputError(f"{place}: is damaged: {error}") from None
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(classes) not in (0, len(weight)):
        raise InputError(f"{place}: is damaged: its weight, bias and classes do not fit together")
    return Head(weight.float(), bias.float(), classes, facts.get("learned_on", ""))


def attach(encoder: Encoder, head: Head, source: Source, url: str) -> AnyClassifier:
    """Return the encoder with the classifier on top. `url` is the classifier's, for messages.

    Raises InputError when the classifier was learned on other weights or on other features.
    """
    place = f"--head {files.redact(url)}"
    if head.weight.shape[1] != encoder.feature_dim:
        raise InputError(
            f"{place}: takes {head.weight.shape[1]:,} features, and the encoder has "
            f"{encoder.feature_dim:,}: give the head of this encoder"
        )
    if head.learned_on not in ("", name_weights(source)):
        raise InputError(
            f"{place}: was learned on other weights ({head.learned_on}) than those of "
            f"{files.redact(source.url)} ({name_weights(source)}): give their --checkpoint and "
            "--network"
        )
    with torch.device("meta"):
        made = build_classifier(source.config, source.size, len(head.weight))
    name = encoder.classifier_name
    state = encoder.stock_state() | {f"{name}.weight": head.weight, f"{name}.bias": head.bias}
    made.stock_module().load_state_dict(state, strict=True, assign=True)
    return made.eval()


def _read_metadata(content: bytes) -> dict[str, str]:
    """Return the texts in the header of a safetensors file. They are empty for other files."""
    if content[8:9] != b"{":
        return {}
    header: Any = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    found = header.get("__metadata__", {})
    return {str(name): str(value) for name, value in found.items()}
