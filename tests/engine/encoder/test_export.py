import copy
import functools
import importlib.util
import io
import itertools
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Generator, Tensor, nn

from engine.encoder.export import FILES, TOLERANCE, Format, convert, verify, verify_timm
from engine.encoder.torchvision_twin import recipe_lines, stock_resnet
from engine.method.initialization import initialize
from engine.method.resnet import ResNet, ResNetConfig
from shards.errors import InputError
from tests.helpers.places import ROOT

pytestmark = pytest.mark.versions

SMALL = ResNetConfig(10, width=0.25, stem="cifar")
NETWORKS = {  # with the side of images
    "small": (SMALL, 32),
    "imagenet": (ResNetConfig(18, width=0.25), 64),
    "resnet18": (ResNetConfig(18), 64),  # which timm has
}

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="the extra onnx is not installed"
)
FORMATS = [pytest.param(f, marks=[needs_onnx] if f == "onnx" else []) for f in FILES]


def draw(config: ResNetConfig) -> ResNet:
    """An encoder in which every tensor matters to the features."""
    encoder, generator = ResNet(config, views=1), Generator().manual_seed(0)
    initialize(encoder, generator)
    for name, value in encoder.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("running_mean") or name.endswith("bias"):
            value.normal_(0, 0.1, generator=generator)
        elif value.ndim == 1:
            value.normal_(1, 0.1, generator=generator)
    return encoder.eval()


def images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=Generator().manual_seed(1))


@functools.cache
def case(network: str) -> tuple[ResNet, ResNetConfig, int]:
    config, size = NETWORKS[network]
    return draw(config), config, size


@functools.cache
def content(network: str, format: Format) -> bytes:
    encoder, config, size = case(network)
    return convert(encoder, config, format, size)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("network", ["small", "imagenet"])
def test_features_are_the_encoders(network: str, format: Format) -> None:
    encoder, config, size = case(network)
    for count in (1, 3):
        found = verify(content(network, format), format, encoder, config, images(count, size))
        assert found < TOLERANCE


def test_without_this_package(tmp_path: Path) -> None:
    """In another process, where nothing but the library that reads a file can be imported."""
    encoder, _, size = case("imagenet")
    torch.save(images(3, size), tmp_path / "images")
    for format in ("torchscript", "torch-export"):
        (tmp_path / FILES[format]).write_bytes(content("imagenet", format))
    script = """
import sys
for name in ("engine", "shards", "torchvision"):
    sys.modules[name] = None
import torch
images = torch.load("images")
with torch.no_grad():
    traced = torch.jit.load("encoder.ts")(images)
    exported = torch.export.load("encoder.pt2").module()(images)
torch.save([traced, exported], "features")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = encoder(images(3, size))
    for features in torch.load(tmp_path / "features"):
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5 * expected.abs().max())


@needs_onnx
def test_onnx_without_torch(tmp_path: Path) -> None:
    import numpy as np

    encoder, _, size = case("imagenet")
    np.save(tmp_path / "images.npy", images(3, size).numpy())
    (tmp_path / FILES["onnx"]).write_bytes(content("imagenet", "onnx"))
    script = """
import sys
for name in ("engine", "shards", "torch"):
    sys.modules[name] = None
import numpy, onnxruntime
session = onnxruntime.InferenceSession("encoder.onnx")
assert [i.name for i in session.get_inputs()] == ["images"]
assert [o.name for o in session.get_outputs()] == ["features"]
assert session.get_inputs()[0].shape[0] == session.get_outputs()[0].shape[0] == "batch"
numpy.save("features.npy", session.run(None, {"images": numpy.load("images.npy")})[0])
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = encoder(images(3, size))
    features = torch.from_numpy(np.load(tmp_path / "features.npy"))
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5 * expected.abs().max())


def change_a_mean(encoder: ResNet) -> None:
    encoder.get_buffer("layer2.0.bn1.running_mean").mul_(1.01)


def swap_layers(encoder: ResNet) -> None:
    block: Any = encoder.layer1[0]
    block.conv1, block.conv2 = block.conv2, block.conv1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("spoil", [change_a_mean, swap_layers])
def test_faults_are_noticed(spoil: Any, format: Format) -> None:
    encoder, config, size = case("small")
    other = copy.deepcopy(encoder)
    spoil(other)
    wrong = convert(other, config, format, size)
    assert verify(wrong, format, encoder, config, images(3, size)) > TOLERANCE


def test_torchscript_takes_any_size() -> None:
    encoder, config, _ = case("imagenet")
    other = images(2, 96)[..., :80]
    assert verify(content("imagenet", "torchscript"), "torchscript", encoder, config, other) < 1e-5


def test_safetensors_go_into_torchvisions_network(tmp_path: Path) -> None:
    config = ResNetConfig(50)
    encoder = draw(config)
    path = tmp_path / FILES["safetensors"]
    path.write_bytes(convert(encoder, config, "safetensors", 64))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    model = torchvision.models.resnet50()
    model.fc = nn.Identity()
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images(2, 64)), encoder(images(2, 64)))


def test_state_dict_is_plain() -> None:
    state = torch.load(io.BytesIO(content("small", "state-dict")), weights_only=True)
    encoder = case("small")[0]
    assert type(state) is dict
    assert list(state) == list(encoder.state_dict())
    assert all(torch.equal(state[key], value) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("format", ["safetensors", "state-dict"])
def test_tensors_are_stored_whole_and_alone(format: Format) -> None:
    """However they lie in memory: strided, or as parts of one large tensor."""
    encoder, config, size = case("small")
    other = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
    flat = torch.zeros(10_000_000)
    for parameter in other.parameters():
        if parameter.ndim == 1:
            parameter.data = flat[: len(parameter)].copy_(parameter.data)
            flat = flat[len(parameter) :]
    made = convert(other, config, format, size)
    assert len(made) == pytest.approx(len(content("small", format)), abs=1000)
    load = safetensors.torch.load if format == "safetensors" else _load_state
    for key, value in load(made).items():
        assert value.is_contiguous()
        assert torch.equal(value, encoder.state_dict()[key])


def _load_state(made: bytes) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(io.BytesIO(made), weights_only=True)
    return state


@pytest.mark.parametrize("format", FORMATS)
def test_files_name_neither_the_package_nor_paths(format: Format) -> None:
    made = content("small", format)
    parts = [made]
    if zipfile.is_zipfile(io.BytesIO(made)):
        with zipfile.ZipFile(io.BytesIO(made)) as archive:
            parts += [archive.read(name) for name in archive.namelist()]
    folders = [sys.prefix, str(Path(torch.__file__).parents[1]), str(ROOT)]
    for word in ["engine", "test_export", "site-packages", *folders]:
        assert not any(word.encode() in part for part in parts), word


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_printed(format: Format, capfd: pytest.CaptureFixture[str]) -> None:
    encoder, config, size = case("small")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        made = convert(encoder, config, format, size)
        verify(made, format, encoder, config, images(2, size))
    assert [str(warning.message) for warning in warned] == []
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_onnx(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, config, size = case("small")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"^--format onnx needs `pip install 'byol-engine\[onnx"):
        convert(encoder, config, "onnx", size)
    with pytest.raises(InputError, match="--format onnx needs"):
        verify(b"", "onnx", encoder, config, images(1, size))


@needs_onnx
def test_too_large_for_onnx() -> None:
    config = ResNetConfig(101, width=4)
    with torch.device("meta"):
        encoder = ResNet(config, views=1)
    with pytest.raises(InputError, match=r"the weights take 2\.\d: choose another format"):
        convert(encoder, config, "onnx", 224)


def test_timm() -> None:
    pytest.importorskip("timm")
    encoder, config, size = case("resnet18")
    state = encoder.state_dict()
    assert verify_timm(state, config, encoder, images(2, size)) == pytest.approx(0, abs=1e-5)
    wrong = state | {"bn1.running_mean": 1.01 * state["bn1.running_mean"]}
    assert (verify_timm(wrong, config, encoder, images(2, size)) or 0) > TOLERANCE
    del wrong["bn1.running_mean"]
    with pytest.raises(RuntimeError, match=r"Missing key.*bn1\.running_mean"):
        verify_timm(wrong, config, encoder, images(2, size))


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig(10),  # timm has no such network
        ResNetConfig(18, stem="cifar"),
        ResNetConfig(18, width=2),
        ResNetConfig(18, projection_shortcut=True),
    ],
)
def test_timm_has_no_such_network(config: ResNetConfig) -> None:
    with torch.device("meta"):
        encoder = ResNet(config, views=1)
    assert verify_timm(encoder.state_dict(), config, encoder, images(1, 32)) is None


def test_timm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, config, size = case("resnet18")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert verify_timm(encoder.state_dict(), config, encoder, images(1, size)) is None


Depth = Literal[10, 18, 34, 50, 101, 152, 200]
DEPTHS: list[Depth] = [10, 18, 34, 50, 101, 152, 200]


@pytest.mark.parametrize("depth", DEPTHS)
def test_stock_keys_and_shapes(depth: Depth) -> None:
    """Of the network itself, and of the one that its lines build."""
    stems: list[Literal["imagenet", "cifar"]] = ["imagenet", "cifar"]
    # Deeper networks have more of the blocks that these depths have.
    every = itertools.product(stems, (0.25, 1, 2), (False, True)) if depth in (18, 50) else ()
    for stem, width, projection in every or zip(stems, (0.25, 2), (True, False), strict=True):
        config = ResNetConfig(depth, width, stem, projection)
        names: dict[str, Any] = {}
        with torch.device("meta"):
            ours, stock = ResNet(config, views=1), stock_resnet(config)
            exec("\n".join(recipe_lines(config, 48)), names)
        expected = [(key, value.shape) for key, value in ours.state_dict().items()]
        for model in (stock, names["model"]):
            assert type(model) is torchvision.models.ResNet
            assert [(key, value.shape) for key, value in model.state_dict().items()] == expected
        assert repr(stock) == repr(names["model"])  # strides and the like


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig(10, width=0.25, projection_shortcut=True),
        ResNetConfig(18, width=0.5, stem="cifar"),
        ResNetConfig(50, width=0.125, stem="cifar"),
    ],
)
def test_lines_build_the_encoder(config: ResNetConfig) -> None:
    names: dict[str, Any] = {}
    exec("\n".join(recipe_lines(config, 48)), names)
    encoder, model = draw(config), names["model"]
    model.load_state_dict(encoder.state_dict(), strict=True)
    with torch.no_grad():
        expected = encoder(images(2, 48))
        torch.testing.assert_close(model.eval()(images(2, 48)), expected, rtol=1e-5, atol=1e-5)


def test_shortest_lines() -> None:
    assert recipe_lines(ResNetConfig(50), 48) == [
        "import torch",
        "import torchvision",
        "",
        "model = torchvision.models.resnet50()",
        "model.fc = torch.nn.Identity()",
    ]
