"""An encoder from a run: sharded or not, the newest or a given one, while others are removed."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.encoder import chosen
from engine.encoder import source as encoder_source
from engine.encoder.source import EncoderConfig, Pixels, open_encoder
from engine.evaluation.features import encoding
from engine.method.encoders import LastGamma
from engine.method.local_shards import whole
from engine.method.resnet import ResNetConfig
from engine.processes.world import World
from engine.recipe import Recipe
from engine.state import checkpoint
from engine.state.checkpoint import CheckpointConfig
from launch import evaluate
from shards.decode import PixelRules
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.engine.processes.test_world import recipe as spread
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, open_trainer, train

ALONE = World(0, 1, 1, torch.device("cpu"))


def ignore(_: str) -> None:
    pass


def train_and_encode(config: Recipe, images: torch.Tensor) -> dict[str, NDArray[np.float64]]:
    """On a rank: features that both networks give in the end, from their gathered weights."""
    trainer = open_trainer(config)
    finish(trainer)
    found = {}
    for name, network in (("online", trainer.online), ("target", trainer.target)):
        alone = config.model.encoder.build(1, config.views.size).double()
        alone.load_state_dict({k: whole(v) for k, v in network.encoder.state_dict().items()})
        found[name] = encoding(alone, "fp64", torch.device("cpu"))(images).numpy()
    return found


@pytest.mark.parametrize(("strategy", "size"), [("fsdp", 3), ("ddp", 2)])
def test_from_a_run_of_several_processes(
    strategy: str, size: int, ranks: Ranks, tiny_data: DataConfig, tmp_path: Path
) -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    config = spread(tiny_data, tmp_path / "run", strategy, steps=3, precision="fp64")
    found = ranks.run(train_and_encode, config, images, size=size)[0]
    for network in ("online", "target"):
        choice = EncoderConfig(network=network)
        source, ours = open_encoder(str(tmp_path / "run"), choice, ALONE, ignore)
        assert (source.step, source.size, source.precision) == (3, 8, "fp64")
        features = encoding(ours, "fp64", torch.device("cpu"))(images)
        # float32 holds the weights meanwhile
        torch.testing.assert_close(features, torch.tensor(found[network]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(torch.tensor(found["online"]), torch.tensor(found["target"]))


@pytest.mark.parametrize("last_gamma", ["zero", "one"])
def test_untrained_is_where_the_run_began(
    last_gamma: LastGamma, tiny_data: DataConfig, tmp_path: Path
) -> None:
    config = tiny.recipe(tiny_data, tmp_path / "run", steps=1, seed=5, probe=tiny.NO_PROBE)
    encoder = ResNetConfig(depth=50, width=1 / 64)
    model = dataclasses.replace(config.model, encoder=encoder, last_gamma=last_gamma)
    config = dataclasses.replace(config, model=model)
    trainer = open_trainer(config)
    began = {k: v.clone() for k, v in trainer.online.encoder.state_dict().items()}
    finish(trainer)
    choice = EncoderConfig(network="untrained")
    _, ours = open_encoder(str(tmp_path / "run"), choice, ALONE, ignore)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, began[name])


def test_a_checkpoint_that_is_pruned_meanwhile(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest when it was looked for; then the run went on."""
    run = str(tmp_path / "run")
    base = tiny.recipe(tiny_data, run, probe=tiny.NO_PROBE, checkpoint=CheckpointConfig(keep=1))
    train(dataclasses.replace(base, steps=2))
    messages: list[str] = []
    load = checkpoint.load

    def go_on_first(commit: checkpoint.Commit, state: dict[str, object], world: World) -> None:
        if commit.step == 2:
            monkeypatch.setattr(checkpoint, "load", load)
            train(dataclasses.replace(base, steps=4))
            monkeypatch.setattr(checkpoint, "load", go_on_first)
        load(commit, state, world)

    monkeypatch.setattr(checkpoint, "load", go_on_first)
    source, _ = open_encoder(run, EncoderConfig(), ALONE, messages.append)
    assert source.step == 4
    assert "the run went on meanwhile; taking a newer checkpoint" in messages[0]


def test_what_the_run_says_of_its_input(tiny_data: DataConfig, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    probe = dataclasses.replace(tiny.NO_PROBE, crop=0.5)
    data = dataclasses.replace(tiny_data, max_pixels=5000, exif="apply")
    train(tiny.recipe(data, run, steps=1, probe=probe))
    source, _ = open_encoder(run, EncoderConfig(), ALONE, ignore)
    assert (source.size, source.crop, source.precision) == (32, 0.5, "fp32")
    given = EncoderConfig(size=64, crop=1.0, precision="bf16")
    source, _ = open_encoder(run, given, ALONE, ignore)
    assert (source.size, source.crop, source.precision) == (64, 1.0, "bf16")
    assert source.rules == PixelRules(max_pixels=5000, exif="apply")
    given = EncoderConfig(exif="ignore")
    source, _ = open_encoder(run, given, ALONE, ignore)
    assert source.rules == PixelRules(max_pixels=5000, exif="ignore")
    files.remove(f"{run}/recipe.json")  # a copied checkpoint folder
    source, _ = open_encoder(f"{run}/checkpoints/step_00000001/", EncoderConfig(), ALONE, ignore)
    assert (source.step, source.crop) == (1, 0.875)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"model.encoder.cells": 3}, r"model.encoder has unknown fields \('cells'\): use the"),
        ({"model.encoder.depth": 10}, "its recipe has no field views.size: use the version"),
    ],
)
def test_a_recipe_of_another_time(
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, int],
    message: str,
) -> None:
    run = str(tmp_path / "run")
    train(tiny.recipe(tiny_data, run, steps=1, probe=tiny.NO_PROBE))
    files.remove(f"{run}/recipe.json")
    find = chosen.find_commit

    def older(*arguments: object) -> checkpoint.Commit:
        commit = find(*arguments)  # type: ignore[arg-type]
        return dataclasses.replace(commit, method=method)

    monkeypatch.setattr(encoder_source, "find_commit", older)
    with pytest.raises(InputError, match=message):
        open_encoder(run, EncoderConfig(), ALONE, ignore)


def test_a_run_of_relative_paths_is_evaluated_from_elsewhere(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recipe.json has absolute ones, and the run goes on with the same command."""
    place = tmp_path / "work here"
    place.mkdir()
    shutil.copytree(Path(tiny_data.train).parent, place / "data")
    monkeypatch.chdir(place)
    data = dataclasses.replace(tiny_data, train="data/train", val="./data/val")
    assert train(tiny.recipe(data, "run", steps=1, probe=tiny.NO_PROBE))
    recipe = json.loads(Path("run/recipe.json").read_text())
    assert recipe["data.train"] == f"{place}/data/train"
    assert recipe["data.val"] == f"{place}/data/val"
    assert train(tiny.recipe(data, "run", steps=2, probe=tiny.NO_PROBE))
    monkeypatch.chdir("/")
    knn = ["knn", f"{place}/run", "--k", "5", "--threads", "1"]
    assert evaluate.main(knn) == 0


@pytest.mark.parametrize("size", [24, 32])
def test_the_pixels_of_small_images_are_features(size: int) -> None:
    images = torch.randn(2, 3, size, size)
    pixels = Pixels(size)
    assert torch.equal(pixels(images), images.flatten(1))
    assert pixels.feature_dim == 3 * size * size


def test_large_images_are_averaged_before_their_pixels_are_features() -> None:
    """At 224 x 224, each of the 32 x 32 pixels is the mean of 7 x 7."""
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    pixels = Pixels(224)
    means = images.reshape(2, 3, 32, 7, 32, 7).mean((3, 5))
    torch.testing.assert_close(pixels(images), means.flatten(1))
    assert pixels.feature_dim == 3072
