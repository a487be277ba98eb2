"""Runs of torchvision's networks: they are opened, exported, started from, and read back."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Generator, Tensor, nn

from engine.encoder import chosen, source
from engine.encoder.classifier import Head, attach
from engine.encoder.export import TOLERANCE, convert, verify
from engine.encoder.foreign_torchvision import match_any
from engine.encoder.source import EncoderConfig, open_encoder
from engine.encoder.torchvision_twin import recipe_lines
from engine.evaluation.feature_extraction import FeaturesConfig, choose_layer
from engine.evaluation.finetune import Classifier
from engine.method.byol import BYOLConfig
from engine.method.resnet import ResNetConfig
from engine.method.torchvision_encoder import TorchvisionConfig, TorchvisionEncoder
from engine.processes.world import World
from engine.recipe import Recipe, in_todays_terms, method_fields
from engine.state.branch import Facts, plan
from engine.state.checkpoint import Commit
from shards.errors import InputError
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.training import open_trainer, train

ALONE = World(0, 1, 1, torch.device("cpu"))
NAME = "shufflenet_v2_x0_5"
MODEL = BYOLConfig(TorchvisionConfig(NAME), hidden=32, projection=16)


def recipe(data: DataConfig, run: Path, model: BYOLConfig = MODEL, steps: int = 2) -> Recipe:
    return tiny.recipe(data, run, model=model, probe=tiny.NO_PROBE, steps=steps)


@pytest.fixture(scope="module")
def run(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, of which the second is a resumed one."""
    folder = tmp_path_factory.mktemp("run")
    train(recipe(tiny_data, folder, steps=1))
    train(recipe(tiny_data, folder))
    return folder


def ignore(_: str) -> None:
    pass


def opened(url: object, **options: object) -> TorchvisionEncoder:
    _, network = open_encoder(str(url), EncoderConfig(**options), ALONE, ignore)  # type: ignore[arg-type]
    assert isinstance(network, TorchvisionEncoder)
    return network.eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=Generator().manual_seed(1))


def equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())


def test_a_run_gives_its_encoders(run: Path, tiny_data: DataConfig) -> None:
    trainer = open_trainer(recipe(tiny_data, run))
    assert trainer.step == 2
    online, target = opened(run), opened(run, network="target")
    for network, there in ((online, trainer.online.encoder), (target, trainer.target.encoder)):
        assert equal(network, there)
    assert not equal(online, target)


def test_untrained_is_the_run_before_its_first_step(
    run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    fresh = open_trainer(recipe(tiny_data, tmp_path)).online.encoder
    assert equal(opened(run, network="untrained"), fresh)


@pytest.mark.parametrize("format", ["safetensors", "state-dict", "torchscript", "torch-export"])
def test_files_give_the_encoders_features(run: Path, format: str) -> None:
    encoder = opened(run)
    content = convert(encoder, encoder.config, format, 32)  # type: ignore[arg-type]
    found = verify(content, format, encoder, encoder.config, images())  # type: ignore[arg-type]
    assert found < TOLERANCE


def test_a_file_loads_strictly_into_torchvisions_network(run: Path, tmp_path: Path) -> None:
    encoder = opened(run)
    path = tmp_path / "encoder.pth"
    path.write_bytes(convert(encoder, encoder.config, "state-dict", 32))
    stock = torchvision.models.shufflenet_v2_x0_5()
    stock.fc = nn.Identity()
    stock.load_state_dict(torch.load(path), strict=True)
    torch.testing.assert_close(stock.eval()(images()), encoder(images()))


@pytest.mark.parametrize("name", ["mnasnet0_5", "mobilenet_v3_small", "regnet_y_400mf"])
@pytest.mark.parametrize("classes", [0, 7])
def test_the_lines_of_a_card_build_the_network(name: str, classes: int) -> None:
    config = TorchvisionConfig(name)
    encoder = config.build(1, 32).eval()
    state, network = encoder.stock_state(), encoder
    if classes:
        model = Classifier(encoder, classes)
        state = model.tensors()
    names: dict[str, nn.Module] = {}
    exec("\n".join(recipe_lines(config, 32, classes)), names)
    names["model"].load_state_dict(dict(state), strict=True)  # a plain dict, as of safetensors
    found = names["model"].eval()(images())
    expected = model.eval()(images()) if classes else network(images())
    torch.testing.assert_close(found, expected)


def test_a_classifier_has_torchvisions_keys(run: Path) -> None:
    source, _ = open_encoder(str(run), EncoderConfig(), ALONE, ignore)
    encoder = opened(run)
    head = Head(torch.randn(5, 1024), torch.randn(5), [], "")
    made = attach(encoder, head, source, "head")
    stock = torchvision.models.shufflenet_v2_x0_5(num_classes=5)
    stock.load_state_dict(made.stock_state(), strict=True)
    logits = encoder(images()) @ head.weight.T + head.bias
    torch.testing.assert_close(made(images()), logits)
    torch.testing.assert_close(stock.eval()(images()), logits)


def test_a_recipe_of_a_size_that_the_network_cannot_have_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = chosen.find_commit
    for name, size in (("vit_b_16", 33), ("maxvit_t", 32), ("inception_v3", 64)):
        changes = {"model.encoder.name": name, "views.size": size}

        def other(*given: Any, changes: dict[str, Any] = changes) -> Any:
            commit = find(*given)
            return dataclasses.replace(commit, method=commit.method | changes)

        monkeypatch.setattr(source, "find_commit", other)
        with pytest.raises(InputError, match=r"its recipe is damaged: views.size must be"):
            opened(run)


def test_layers_are_refused(run: Path) -> None:
    encoder = opened(run)
    assert choose_layer(encoder, FeaturesConfig()) is encoder
    with pytest.raises(InputError, match=r"layers are told apart in ResNets.*leave out --layer"):
        choose_layer(encoder, FeaturesConfig(layer="layer2"))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [(NAME, ""), ("mobilenet_v3_small", "state_dict.module."), ("mnasnet0_5", "a.")],
)
def test_others_files_are_matched_by_torchvisions_names(name: str, prefix: str) -> None:
    network = torchvision.models.get_model(name, weights=None)
    tensors = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    found, size = match_any(tensors, "online", "file", None)
    assert (found.config, size) == (TorchvisionConfig(name), 224)
    assert found.state.keys() <= network.state_dict().keys()
    assert "left out 2" in found.report
    encoder = TorchvisionConfig(name).build(1, 64)
    encoder.network.load_state_dict(found.state, strict=True)


def test_the_size_of_a_transformer_is_read_from_its_positions() -> None:
    with torch.device("meta"):
        network = torchvision.models.vit_b_32(image_size=96)
    tensors = {name: torch.zeros(value.shape) for name, value in network.state_dict().items()}
    found, size = match_any(tensors, "online", "file", None)
    assert (found.config, size) == (TorchvisionConfig("vit_b_32"), 96)


def test_a_file_of_nothing_known_is_refused() -> None:
    with pytest.raises(InputError, match="nor does it hold another network of torchvision"):
        match_any({"features.0.weight": torch.zeros(3, 3)}, "online", "file", None)


def test_a_run_starts_from_a_run_and_from_a_file(
    run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    encoder, path = opened(run), tmp_path / "encoder.pth"
    path.write_bytes(convert(encoder, encoder.config, "state-dict", 32))
    for number, start in enumerate((run, path)):
        model = dataclasses.replace(MODEL, start=str(start))
        trainer = open_trainer(recipe(tiny_data, tmp_path / str(number), model))
        assert trainer.step == 0
        assert equal(trainer.online.encoder.eval(), encoder)


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        (
            ResNetConfig(10, width=0.125),
            r"there 'TorchvisionConfig', here ResNetConfig\): use a recipe file with model="
            rf"BYOLConfig\(encoder=TorchvisionConfig\(name='{NAME}'\)\) for these weights",
        ),
        (TorchvisionConfig("shufflenet_v2_x1_0"), rf"give --model.encoder.name {NAME}"),
    ],
)
def test_a_start_from_another_encoder_is_refused(
    run: Path,
    tiny_data: DataConfig,
    tmp_path: Path,
    encoder: ResNetConfig | TorchvisionConfig,
    told: str,
) -> None:
    model = dataclasses.replace(MODEL, encoder=encoder, start=str(run))
    with pytest.raises(InputError, match=told):
        open_trainer(recipe(tiny_data, tmp_path, model))


@pytest.mark.parametrize(
    ("encoder", "name", "told"),
    [
        (
            ResNetConfig(18),
            "mobilenet_v3_small",
            r"there 'TorchvisionConfig', .* a recipe file with model=BYOLConfig\(encoder="
            r"TorchvisionConfig\(name='mobilenet_v3_small'\)\)",
        ),
        (
            TorchvisionConfig("mobilenet_v3_small"),
            "resnet34",
            r"encoder=ResNetConfig\(depth=34.*\)\) for these weights",
        ),
        (
            TorchvisionConfig("mobilenet_v3_small"),
            "shufflenet_v2_x0_5",
            "give --model.encoder.name shufflenet_v2_x0_5$",
        ),
        (TorchvisionConfig("resnet18"), "resnet34", "give --model.encoder.name resnet34$"),
    ],
)
def test_a_file_of_another_network_is_told_by_name(
    tiny_data: DataConfig,
    tmp_path: Path,
    encoder: ResNetConfig | TorchvisionConfig,
    name: str,
    told: str,
) -> None:
    path = tmp_path / "file.pth"
    torch.save(torchvision.models.get_model(name, weights=None).state_dict(), path)
    model = dataclasses.replace(MODEL, encoder=encoder, start=str(path))
    with pytest.raises(InputError, match=rf"^model\.start .*/file\.pth: is of another .*{told}"):
        open_trainer(recipe(tiny_data, tmp_path, model))


def test_a_run_goes_on_with_its_own_encoder_only(run: Path, tiny_data: DataConfig) -> None:
    other = dataclasses.replace(MODEL, encoder=TorchvisionConfig("resnet18"))
    with pytest.raises(InputError, match=r"model.encoder.name: there shufflenet_v2_x0_5, here res"):
        open_trainer(recipe(tiny_data, run, other))


def test_runs_of_earlier_versions_had_resnets() -> None:
    method = method_fields(Recipe())
    assert method["model.encoder"] == "ResNetConfig"
    del method["model.encoder"]
    assert in_todays_terms(method)["model.encoder"] == "ResNetConfig"


def branch(there: dict[str, object], here: dict[str, object]) -> None:
    common = {"model.encoder": "TorchvisionConfig", "batch.size": 8}
    parent = Commit("s3://b/run/checkpoints/step_00000001", 1, {}, "", {})
    before, after = (Facts({**common, **method}, "", 8) for method in (there, here))
    plan(parent, before, after, {}, 0)


@pytest.mark.parametrize(
    ("here", "told"),
    [
        ({"model.encoder": "ResNetConfig"}, "use a recipe whose encoder is of that kind, or take"),
        ({"model.encoder.name": "vit_b_32"}, "give --model.encoder.name vit_b_16, or take"),
        ({"views.size": 224}, r"views.size: there 96, here 224\): give --views.size 96, or take"),
    ],
)
def test_a_branch_keeps_kind_name_and_a_transformers_size(
    here: dict[str, object], told: str
) -> None:
    there: dict[str, object] = {"model.encoder.name": "vit_b_16", "views.size": 96}
    with pytest.raises(InputError, match=told):
        branch(there, there | here)
