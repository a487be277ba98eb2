"""Exports that timm and torchvision load, and heads that carry the names of their classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.encoder.classifier import Classifier, read_head, save_head
from engine.encoder.hub import TIMM_DEPTHS, timm_name
from engine.method.augment import MEAN
from engine.method.resnet import ResNet, ResNetConfig
from launch import evaluate, export
from shards.errors import InputError
from shards.loader import DataConfig
from shards.making import synthetic
from tests.engine.encoder.test_export import draw, images
from tests.helpers import tiny
from tests.helpers.training import train

FEW = ["--epochs", "2", "--batch", "16", "--lr", "0.1", "--threads", "1"]


@pytest.fixture(scope="module")
def run(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("heads") / "run")
    assert train(tiny.recipe(tiny_data, url, steps=8, probe=tiny.NO_PROBE))
    return url


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ResNet]:
    """A file of a ResNet-18 in which every tensor matters."""
    encoder, path = draw(ResNetConfig(18)), tmp_path_factory.mktemp("r18") / "r18.safetensors"
    save_file(encoder.state_dict(), path)
    return str(path), encoder


def close(found: Tensor, expected: Tensor) -> None:
    found, expected = found.detach(), expected.detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("formats", [["safetensors"], ["state-dict"], ["torchscript"]])
def test_timm_takes_the_folder(
    formats: list[str], resnet18: tuple[str, ResNet], tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    url, encoder = resnet18
    out = tmp_path / "out of it"
    assert export.main([url, str(out), "--size", "64", "--format", *formats]) == 0
    if formats == ["torchscript"]:
        assert not (out / "config.json").exists()
        return
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    close(model(images(2, 64)), encoder(images(2, 64)))
    wanted = timm.data.resolve_model_data_config(model)
    assert (tuple(wanted["input_size"]), wanted["crop_pct"]) == ((3, 64, 64), 0.875)
    assert (tuple(wanted["mean"]), wanted["interpolation"]) == (MEAN, "bicubic")


def test_timm_has_all_named_depths() -> None:
    timm = pytest.importorskip("timm")
    assert all(timm.is_model(f"resnet{depth}") for depth in TIMM_DEPTHS)
    assert timm_name(ResNetConfig(10)) == timm_name(ResNetConfig(18, width=2)) == ""


@torch.no_grad()
def test_a_head_makes_a_classifier(
    resnet18: tuple[str, ResNet], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every format gives the logits, and timm has the names of the classes."""
    timm = pytest.importorskip("timm")
    url, encoder = resnet18
    fc = {"fc.weight": torch.randn(3, 512), "fc.bias": torch.randn(3)}
    (tmp_path / "head.safetensors").write_bytes(save_head(fc, ["ant", "bee", "cat"]))
    head, out = ["--head", f"{tmp_path}/head.safetensors"], tmp_path / "out"
    assert export.main([url, str(out), "--size", "64", "--format", "safetensors"]) == 0
    more = ["--format", "safetensors", "torchscript", "torch-export"]
    assert export.main([url, str(out), "--size", "64", *head, *more]) == 1
    assert "other weights (without a head): choose" in capsys.readouterr().err
    assert export.main([url, str(out), "--size", "64", *head, *more, "--overwrite"]) == 0
    files = [
        "card.json",
        "classifier.pt2",
        "classifier.safetensors",
        "classifier.ts",
        "config.json",
    ]
    assert sorted(path.name for path in out.iterdir()) == files
    expected = encoder(images(2, 64)) @ fc["fc.weight"].T + fc["fc.bias"]
    close(torch.jit.load(f"{out}/classifier.ts")(images(2, 64)), expected)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    close(model(images(2, 64)), expected)
    assert model.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    stock = torchvision.models.resnet18(num_classes=3)
    stock.load_state_dict(load_file(f"{out}/classifier.safetensors"))
    close(stock.eval()(images(2, 64)), expected)
    written = json.loads((out / "card.json").read_text())
    assert written["classes"] == ["ant", "bee", "cat"]
    assert written["build"][-1] == "model.fc = torch.nn.Linear(512, 3)"


def test_the_head_of_a_linear_evaluation(run: str, tmp_path: Path) -> None:
    """It has names, it goes on top of its own encoder only, and loads in the documented lines."""
    out = ["--out", f"{tmp_path}/linear"]
    assert evaluate.main(["linear", run, *FEW, *out]) == 0
    (head,) = tmp_path.glob("linear/**/head.safetensors")
    with safetensors.safe_open(head, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(synthetic.CLASSES)
    exported = str(tmp_path / "exported")
    assert export.main([run, exported, "--format", "safetensors", "--head", str(head)]) == 0
    config = json.loads(Path(exported, "config.json").read_text())
    assert config["label_names"] == list(synthetic.CLASSES)
    names: dict[str, Any] = {}
    exec("\n".join(config["build"]), names)
    model: nn.Module = names["model"]
    model.load_state_dict(load_file(f"{exported}/{config['weights']}"))
    plain = str(tmp_path / "plain")
    assert export.main([run, plain, "--format", "safetensors"]) == 0
    both = load_file(f"{plain}/encoder.safetensors") | load_file(head)
    names["model"].load_state_dict(both)
    assert both.keys() == load_file(f"{exported}/classifier.safetensors").keys()
    for other in (["--network", "target"], ["--checkpoint", "4"]):
        assert export.main([run, f"{tmp_path}/other", *other, "--head", str(head)]) == 1


def test_a_fine_tuned_network(run: str, tmp_path: Path) -> None:
    """Its folder has the lines that build it, and it can be exported."""
    assert evaluate.main(["finetune", run, *FEW, "--out", f"{tmp_path}/tuned"]) == 0
    (weights,) = tmp_path.glob("tuned/**/model.safetensors")
    config = json.loads((weights.parent / "config.json").read_text())
    assert config["label_names"] == list(synthetic.CLASSES)
    names: dict[str, Any] = {}
    exec("\n".join(config["build"]), names)
    names["model"].load_state_dict(load_file(weights))
    x = images(2, 32)
    expected = names["model"].eval()(x)
    options = ["--size", "32", "--format", "torchscript", "--head", str(weights)]
    assert export.main([str(weights), f"{tmp_path}/out", *options]) == 0
    close(torch.jit.load(f"{tmp_path}/out/classifier.ts")(x), expected)


def test_mistakes_are_one_line(
    resnet18: tuple[str, ResNet], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, encoder = resnet18
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    narrow = {"fc.weight": torch.zeros(3, 64), "fc.bias": torch.zeros(3)}
    (tmp_path / "narrow.safetensors").write_bytes(save_head(narrow, []))
    wide = {"fc.weight": torch.ones(3, 512), "fc.bias": torch.zeros(3)}
    (tmp_path / "other.safetensors").write_bytes(save_head(wide, [], "0123"))
    (tmp_path / "names.safetensors").write_bytes(save_head(wide, ["a"]))
    (tmp_path / "no.safetensors").write_bytes(b"no head")
    for name, text in (
        ("narrow", "takes 64 features, and the encoder has 512"),
        ("other", "was learned on other weights (0123)"),
        ("names", "its weight, bias and classes do not fit together"),
        ("no", "is not a whole safetensors file"),
        ("none", "no such file"),
        ("encoder", "has no fc.weight"),
    ):
        arguments = [url, f"{tmp_path}/out", "--head", f"{tmp_path}/{name}.safetensors"]
        assert export.main(arguments) == 1, name
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: --head ")
        assert text in line
    (tmp_path / "linear").mkdir()
    save_file({}, tmp_path / "linear" / "head.safetensors")
    for folder in ("linear", ""):
        assert export.main([url, f"{tmp_path}/out", "--head", str(tmp_path / folder)]) == 1
        told = f"is a folder: give {tmp_path}/linear/head.safetensors\n"
        assert capsys.readouterr().err.endswith(told)
    assert export.main([url, f"{tmp_path}/out", "--threads", "0"]) == 1
    assert "--threads must be from 1" in capsys.readouterr().err
    with pytest.raises(InputError, match="names no bucket"):
        read_head("s3://")


def test_its_names_are_torchvisions() -> None:
    ours = Classifier(ResNetConfig(18), 7).state_dict()
    assert ours.keys() == torchvision.models.resnet18(num_classes=7).state_dict().keys()


def test_equal_heads_are_equal_files() -> None:
    """And every reader of the format takes them."""
    tensors = {"fc.weight": torch.randn(3, 5), "fc.bias": torch.randn(3), "x": torch.ones(1)}
    made = {save_head(tensors, ["é", "b", "c"], "online 0123") for _ in range(20)}
    assert len(made) == 1
    found = safetensors.torch.load(made.pop())
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
