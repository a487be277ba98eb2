"""The encoder in files that other software reads. None of them names this package.

All are made from torchvision's network (torchvision_twin.py). What a tracer notes about the code
that it ran is left out: it would tell the paths of the machine that made the file.
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

from engine.encoder.torchvision_twin import stock_resnet
from engine.method.resnet import ResNet, ResNetConfig
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
"""What `verify` may find. Measured on random weights with the statistics of noise images:
onnxruntime, which folds batch norms into convolutions, differs from torch by 2e-6 at 50 layers and
4e-6 at 200, the other formats by nothing; one running mean that is wrong by 1% makes 3e-4 or more.
"""

_ONNX_BYTES = 2**31  # that a file holds at most: a limit of protobuf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch about its own insides, or that a format is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@_quiet()
def convert(encoder: ResNet, config: ResNetConfig, format: Format, size: int) -> bytes:
    """The encoder as the content of a file of `format`; any batch size goes through it.

    Args:
        encoder: In evaluation mode, float32, on the CPU.
        config: The encoder's.
        size: Side in pixels of the example that is traced. Files of torch-export and onnx take
            images of this size alone, the others of any.

    Raises InputError when onnx is asked for and its packages are missing, or the weights are too
    many for it.
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
        # Copies, since torch.save would store all of a tensor that these are parts of.
        state = {
            key: value.clone(memory_format=torch.contiguous_format)
            for key, value in encoder.state_dict().items()
        }
        if format == "safetensors":
            return safetensors.torch.save(state, {"format": "pt"})
        torch.save(state, buffer)
        return buffer.getvalue()

    network = _stock_with(encoder.state_dict(), config)
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
        dynamic_shapes=shapes,  # again, for the dimension's name
        input_names=["images"],
        output_names=["features"],
        verbose=False,
    )
    assert converted is not None  # as without `dynamo`
    content: bytes = converted.model_proto.SerializeToString()
    return content


@_quiet()
@torch.no_grad()
def verify(
    content: bytes, format: Format, encoder: ResNet, config: ResNetConfig, images: Tensor
) -> float:
    """How far the features that a file gives are from the encoder's: max|a - b| / max|a|.

    Args:
        content: The file's, loaded as its users do: by torch, torchvision, safetensors or
            onnxruntime.
        encoder: In evaluation mode, float32, on the CPU.
        images: [N, 3, S, S] normalized; S as in `convert`.

    Not a number when features are not. Raises InputError when onnx's packages are missing, and
    what the loading library raises when it cannot read the file.
    """
    if format == "onnx":
        _import_onnx()
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
    else:
        found = _load(content, format, config)(images)
    return _difference(encoder(images), found)


@torch.no_grad()
def verify_timm(
    state: dict[str, Tensor], config: ResNetConfig, encoder: ResNet, images: Tensor
) -> float | None:
    """As `verify`, for timm's network of this depth with `state` in it.

    None where timm is not installed or has no such network.
    """
    if config.stem != "imagenet" or config.width != 1 or config.projection_shortcut:
        return None
    try:
        import timm
    except ImportError:
        return None
    name = f"resnet{config.depth}"
    if not timm.is_model(name):
        return None
    network = timm.create_model(name, num_classes=0)
    network.load_state_dict(state, strict=True)
    return _difference(encoder(images), network.eval()(images))


def _load(content: bytes, format: Format, config: ResNetConfig) -> nn.Module:
    buffer = io.BytesIO(content)
    if format == "torchscript":
        traced: nn.Module = torch.jit.load(buffer)
        return traced
    if format == "torch-export":
        return torch.export.load(buffer).module()
    if format == "state-dict":
        return _stock_with(torch.load(buffer, weights_only=True), config)
    return _stock_with(safetensors.torch.load(content), config)


def _stock_with(state: dict[str, Tensor], config: ResNetConfig) -> nn.Module:
    """The stock network in evaluation mode, with these very tensors as its weights."""
    with torch.device("meta"):  # else weights would be drawn for nothing
        network: nn.Module = stock_resnet(config)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def _without_debug(traced: io.BytesIO) -> bytes:
    """A TorchScript file less the call stacks it was traced under, with the paths of all code."""
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
