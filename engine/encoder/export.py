"""Convert an encoder or a classifier to files that other software reads without this package.

The files of weights have torchvision's names. The files of programs are traced from torchvision's
network (torchvision_twin.py) with these weights. A tracer also stores call stacks. They are
removed, because they have paths of the machine that made the file.
"""

import contextlib
import importlib
import io
import warnings
import zipfile
from collections.abc import Iterator
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from engine.encoder.hub import timm_name
from engine.encoder.torchvision_twin import stock_network
from engine.method.encoders import BackboneConfig, Encoder
from shards.errors import InputError

Format = Literal["safetensors", "state-dict", "torchscript", "torch-export", "onnx"]

FILES: dict[Format, str] = {
    "safetensors": "encoder.safetensors",
    "state-dict": "encoder.pth",
    "torchscript": "encoder.ts",
    "torch-export": "encoder.pt2",
    "onnx": "encoder.onnx",
}

TOLERANCE = 5e-5
"""Largest relative difference that `verify` may find.

It was measured on random weights with the statistics of noise images. onnxruntime folds batch norms
into convolutions and differs from torch by 2e-6 at 50 layers and 4e-6 at 200. The other formats do
not differ. A single running mean that is wrong by 1% makes a difference of 3e-4 or more.
"""

_ONNX_BYTES = 2**31  # protobuf's limit for a file


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide torch's warnings about its own internals and about deprecated formats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@_quiet()
def convert(encoder: Encoder, config: BackboneConfig, format: Format, size: int) -> bytes:
    """Convert the encoder to the content of a file of `format`, which takes any batch size.

    Args:
        encoder: The encoder in evaluation mode, float32, on the CPU.
        config: The encoder's shape.
        format: The file's format.
        size: Side in pixels of the example that is traced. Files of torch-export and onnx take
            only images of this size. The others take any size.

    Raises InputError for onnx when its packages are missing or the weights are too large for it.
    """
    if format == "onnx":
        _import_onnx()
        weights = sum(value.nbytes for value in encoder.parameters())
        if weights >= _ONNX_BYTES:
            raise InputError(
                f"--format onnx: one file holds 2.1 GB at most, and the weights take "
                f"{weights / 1e9:.1f}: choose another format"
            )
    buffer = io.BytesIO()
    if format in ("safetensors", "state-dict"):
        # These are copies, because torch.save stores the whole storage of a tensor that is a view.
        state = {
            key: value.clone(memory_format=torch.contiguous_format)
            for key, value in encoder.stock_state().items()
        }
        if format == "safetensors":
            return safetensors.torch.save(state, {"format": "pt"})
        torch.save(state, buffer)
        return buffer.getvalue()

    network = _stock_with(encoder.stock_state(), encoder, config, size)
    example = torch.zeros(2, 3, size, size)  # a batch of 1 could be taken for a constant
    if format == "torchscript":
        with torch.no_grad():
            torch.jit.save(torch.jit.trace(network, example, check_trace=False), buffer)
        return _without_debug(buffer)

    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    if format == "torch-export":
        torch.export.save(program, buffer)
        return buffer.getvalue()
    converted = torch.onnx.export(
        program,
        (example,),
        dynamic_shapes=shapes,  # given again to name the dimension
        input_names=["images"],
        output_names=["features"],
        verbose=False,
    )
    assert converted is not None  # only the exporter without dynamo returns None
    content: bytes = converted.model_proto.SerializeToString()
    return content


@_quiet()
@torch.no_grad()
def verify(
    content: bytes, format: Format, encoder: Encoder, config: BackboneConfig, images: Tensor
) -> float:
    """Measure how far a file's features are from the encoder's: max|a - b| / max|a|.

    The file is loaded as its users load it, by torch, torchvision, safetensors or onnxruntime.

    Args:
        content: The file's content.
        format: The file's format.
        encoder: The encoder in evaluation mode, float32, on the CPU.
        config: The encoder's shape.
        images: [N, 3, S, S] normalized; S is `size` of `convert`.

    Returns:
        The difference, which is nan when a feature is nan.

    Raises InputError when onnx's packages are missing, and any error of the library that cannot
    load the file.
    """
    if format == "onnx":
        _import_onnx()
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
    else:
        found = _load(content, format, encoder, config, images.shape[-1])(images)
    return _difference(encoder(images), found)


@torch.no_grad()
def verify_timm(
    state: dict[str, Tensor], config: BackboneConfig, encoder: Encoder, images: Tensor
) -> float | None:
    """Measure the same difference for timm's network of this depth with the weights in `state`.

    Return None when timm is not installed or has no such network.
    """
    if not timm_name(config):
        return None
    try:
        import timm
    except ImportError:
        return None
    classes = len(state["fc.weight"]) if "fc.weight" in state else 0
    network = timm.create_model(timm_name(config), num_classes=classes)
    network.load_state_dict(state, strict=True)
    return _difference(encoder(images), network.eval()(images))


def _load(
    content: bytes, format: Format, encoder: Encoder, config: BackboneConfig, size: int
) -> nn.Module:
    buffer = io.BytesIO(content)
    if format == "torchscript":
        traced: nn.Module = torch.jit.load(buffer)
        return traced
    if format == "torch-export":
        return torch.export.load(buffer).module()
    if format == "state-dict":
        return _stock_with(torch.load(buffer, weights_only=True), encoder, config, size)
    return _stock_with(safetensors.torch.load(content), encoder, config, size)


def _stock_with(
    state: dict[str, Tensor], encoder: Encoder, config: BackboneConfig, size: int
) -> nn.Module:
    """Build the stock network in evaluation mode with these tensors, uncopied, as its weights."""
    with torch.device("meta"):  # so that no weights are drawn
        classes = len(state.get(f"{encoder.classifier_name}.weight", ()))
        network = stock_network(config, size, classes)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def _without_debug(traced: io.BytesIO) -> bytes:
    """Remove the tracer's call stacks, which have paths of code, from a TorchScript file."""
    kept = io.BytesIO()
    with zipfile.ZipFile(traced) as source, zipfile.ZipFile(kept, "w") as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(entry, source.read(entry))
    return kept.getvalue()


def _import_onnx() -> None:
    try:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(name)
    except ImportError:
        raise InputError("--format onnx needs `pip install 'byol-engine[onnx]'`") from None


def _difference(features: Tensor, found: Tensor) -> float:
    return ((features - found).abs().max() / features.abs().max()).item()
