"""Weights that a run starts from: what is taken, what is drawn, and what a later start needs."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from engine.method.byol import BYOLConfig
from engine.method.local_shards import whole
from engine.method.resnet import ResNet, ResNetConfig
from engine.recipe import Recipe
from engine.state.checkpoint import CheckpointConfig
from engine.trainer import Trainer
from shards.errors import InputError
from shards.index import Index
from shards.loader import DataConfig
from shards.storage import files
from tests.engine.processes.test_world import recipe as spread
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import open_trainer, train

ENCODER = ResNetConfig(depth=10, width=0.125)
TINY = BYOLConfig(encoder=ENCODER, hidden=32, projection=16)


def recipe(data: DataConfig, run: Path | str, start: Path | str = "", **changes: Any) -> Recipe:
    model = dataclasses.replace(TINY, start=str(start))
    given = {"model": model, "probe": tiny.NO_PROBE, "checkpoint": CheckpointConfig(every=0)}
    return tiny.recipe(data, run, **given | changes)


def states(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of all tensors of both networks, by `online.NAME` and `target.NAME`."""
    return {
        f"{side}.{name}": whole(value).clone()
        for side, network in (("online", trainer.online), ("target", trainer.target))
        for name, value in network.state_dict().items()
    }


def equal(ours: dict[str, Tensor], other: dict[str, Tensor], part: str) -> bool:
    """Return whether all tensors whose names begin with `part` are equal."""
    names = [name for name in ours if name.startswith(part)]
    assert names
    return all(torch.equal(ours[name], other[name]) for name in names)


def torch_file(path: Path, config: ResNetConfig, prefix: str = "", seed: int = 0) -> Path:
    """Write a file of torch.save with a network of this shape and a classifier."""
    torch.manual_seed(seed)
    network = ResNet(config, views=1)
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state | {f"{prefix}fc.weight": torch.zeros(5, 3)}}, path)
    return path


@pytest.fixture(scope="module")
def parent(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("parent")
    train(recipe(tiny_data, run, steps=2))
    return run


def test_all_networks_of_a_run_are_taken(
    parent: Path, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = states(open_trainer(recipe(tiny_data, parent)))
    capsys.readouterr()
    trainer = open_trainer(recipe(tiny_data, tmp_path, parent, seed=3))
    assert trainer.step == 0
    ours = states(trainer)
    assert ours.keys() == there.keys()
    assert equal(ours, there, "")  # with the running statistics and the online head
    assert not torch.equal(ours["target.encoder.bn1.running_mean"], torch.zeros(8))
    assert not any(m["momentum_buffer"].any() for m in trainer.state()["optimizer"].values())
    said = capsys.readouterr().out.replace("\n", "")
    assert "all networks are taken, and the online head of 8 classes" in said


def test_heads_of_other_shapes_are_drawn(
    parent: Path, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = states(open_trainer(recipe(tiny_data, parent)))
    model = dataclasses.replace(TINY, hidden=48)
    drawn = states(open_trainer(recipe(tiny_data, tmp_path, model=model)))
    model = dataclasses.replace(model, start=str(parent / "checkpoints" / "step_00000002"))
    capsys.readouterr()
    ours = states(open_trainer(recipe(tiny_data, tmp_path, model=model)))
    assert equal(ours, there, "online.encoder")
    encoder = {n: v for n, v in there.items() if n.startswith("online.encoder.")}
    online = {name.replace("online.", "target."): value for name, value in encoder.items()}
    assert equal(ours, online, "target.encoder")
    for part in ("online.projector", "online.predictor", "online.classifier", "target.projector"):
        assert equal(ours, drawn, part)
    assert "heads there have other shapes" in capsys.readouterr().out.replace("\n", "")


def test_a_head_of_other_classes_is_drawn(
    parent: Path,
    packed: Index,
    tiny_data: DataConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = states(open_trainer(recipe(tiny_data, parent)))
    data = DataConfig(train=packed.url, streams=4)
    ours = states(open_trainer(recipe(data, tmp_path / "run", parent)))
    for part in ("online.projector", "online.predictor", "target."):
        assert equal(ours, there, part)
    assert ours["online.classifier.weight"].shape == (3, 64)
    assert "it has 8 classes there and 3 here" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_of_torchvision_starts_both_encoders(
    kind: str, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=3)
    file = tmp_path / f"resnet18.{kind}"
    if kind == "pth":
        torch.save(network.state_dict(), file)
    else:
        safetensors.torch.save_file(network.state_dict(), file)
    model = dataclasses.replace(TINY, encoder=ResNetConfig(depth=18), start=str(file))
    trainer = open_trainer(recipe(tiny_data, tmp_path / "run", model=model))
    for name, value in network.state_dict().items():
        if not name.startswith("fc."):
            for side in (trainer.online, trainer.target):
                assert torch.equal(side.encoder.state_dict()[name], value)
    said = capsys.readouterr().out.replace("\n", "")
    assert "ResNet-18, matched by name: 120 tensors; left out 2 (fc." in said
    trainer.train_step(next(trainer.batches()))


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_of_timm_starts_both_encoders(
    kind: str, tiny_data: DataConfig, tmp_path: Path
) -> None:
    network = pytest.importorskip("timm").create_model("resnet18", pretrained=False).eval()
    path, state = tmp_path / f"timm.{kind}", network.state_dict()
    if kind == "pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    model = BYOLConfig(ResNetConfig(depth=18), hidden=32, projection=16, start=str(path))
    trainer = open_trainer(recipe(tiny_data, tmp_path / "run", model=model))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network.forward_features(images).mean(dim=(2, 3))
        for side in (trainer.online, trainer.target):
            twin = model.encoder.build(1, 32).eval()
            own = {name: whole(value) for name, value in side.encoder.state_dict().items()}
            twin.load_state_dict(own)
            torch.testing.assert_close(twin(images), expected, rtol=1e-4, atol=1e-4)


def test_another_encoder_is_refused_with_the_fields(
    parent: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    wider = ResNetConfig(depth=18, width=0.25, stem="cifar", projection_shortcut=True)
    file = torch_file(tmp_path / "wider.pth", wider)
    flags = (
        r"give --model.encoder.depth 18 --model.encoder.width 0.25 --model.encoder.stem cifar "
        r"--model.encoder.projection-shortcut$"
    )
    with pytest.raises(InputError, match=rf"model.start .*wider.pth: is of another.*{flags}"):
        open_trainer(recipe(tiny_data, tmp_path / "run", file))
    model = BYOLConfig(encoder=wider, start=str(parent))
    flags = r"give --model.encoder.depth 10 .*--model.encoder.no-projection-shortcut$"
    with pytest.raises(InputError, match=flags):
        open_trainer(recipe(tiny_data, tmp_path / "run", model=model))
    with pytest.raises(InputError, match=r"model.start .*nowhere: nothing there"):
        open_trainer(recipe(tiny_data, tmp_path / "run", tmp_path / "nowhere"))


def test_of_several_networks_the_prefix_chooses(tiny_data: DataConfig, tmp_path: Path) -> None:
    state = {
        f"{prefix}{name}": value
        for seed, prefix in enumerate(("a.", "b."))
        for name, value in torch.load(torch_file(tmp_path / f"{seed}.pth", ENCODER, seed=seed))[
            "state_dict"
        ].items()
    }
    torch.save(state, tmp_path / "both.pth")
    with pytest.raises(InputError, match=r"give --model.start-prefix PREFIX, one of"):
        open_trainer(recipe(tiny_data, tmp_path / "run", tmp_path / "both.pth"))
    model = dataclasses.replace(TINY, start=str(tmp_path / "both.pth"), start_prefix="b.")
    trainer = open_trainer(recipe(tiny_data, tmp_path / "run", model=model))
    assert torch.equal(trainer.online.encoder.state_dict()["conv1.weight"], state["b.conv1.weight"])
    with pytest.raises(InputError, match=r"model.start_prefix is for model.start"):
        recipe(tiny_data, "run", model=dataclasses.replace(model, start="")).check()


def test_a_run_goes_on_without_the_file(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = torch_file(tmp_path / "given.pth", ENCODER), tmp_path / "run"
    train(recipe(tiny_data, run, file, steps=1))
    digest = json.loads((run / "recipe.json").read_text())["model.start_digest"]
    commit = json.loads((run / "checkpoints" / "step_00000001" / "commit.json").read_text())
    assert commit["origin"]["weights"] == {"url": str(file), "digest": digest}
    moved = file.rename(tmp_path / "moved.pth")
    train(recipe(tiny_data, run, file, steps=2))  # neither read nor needed
    train(recipe(tiny_data, run, moved, steps=3))  # the same weights elsewhere
    assert json.loads((run / "recipe.json").read_text())["model.start_digest"] == digest
    other = torch_file(tmp_path / "other.pth", ENCODER, seed=1)
    with pytest.raises(InputError, match=rf"not the weights that run .* \(digest there {digest}"):
        train(recipe(tiny_data, run, other, steps=4))
    with pytest.raises(InputError, match=r"is not given: run .* began with the weights of"):
        train(recipe(tiny_data, run, steps=4))
    capsys.readouterr()
    train(recipe(tiny_data, run, tmp_path / "gone.pth", steps=4))
    assert "goes on without them" in capsys.readouterr().out.replace("\n", " ")


def test_weights_are_not_put_into_a_run_that_began_without(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    """Also where the run has no checkpoint yet, and where the file there is another one by now."""
    file, run = torch_file(tmp_path / "given.pth", ENCODER), tmp_path / "run"
    train(recipe(tiny_data, run, steps=1))
    with pytest.raises(InputError, match=r"began with drawn weights: leave --model.start out"):
        train(recipe(tiny_data, run, file))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match=r"began with drawn weights: leave --model.start out"):
        train(recipe(tiny_data, run, file))
    run = tmp_path / "second"
    train(recipe(tiny_data, run, file, steps=1))
    shutil.rmtree(run / "checkpoints")
    train(recipe(tiny_data, run, file, steps=1))
    shutil.rmtree(run / "checkpoints")
    torch_file(file, ENCODER, seed=1)
    with pytest.raises(InputError, match="not the weights that run"):
        train(recipe(tiny_data, run, file, steps=1))


def start_on_ranks(config: Recipe) -> dict[str, Any]:
    trainer = open_trainer(config)
    found = {name: value.numpy() for name, value in states(trainer).items()}
    trainer.train_step(next(trainer.batches()))
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_on_several_processes(
    strategy: str, ranks: Ranks, tiny_data: DataConfig, tmp_path: Path
) -> None:
    config = spread(tiny_data, tmp_path / "parent", steps=2)
    train(config)
    there = states(open_trainer(config))
    model = dataclasses.replace(config.model, start=str(tmp_path / "parent"))
    mine = spread(tiny_data, tmp_path / "run", strategy, steps=2, seed=9)
    mine = dataclasses.replace(mine, model=model)
    for found in ranks.run(start_on_ranks, mine, size=2):
        assert equal({n: torch.as_tensor(v) for n, v in found.items()}, there, "")


def test_from_object_storage(parent: Path, tiny_data: DataConfig, s3: str, tmp_path: Path) -> None:
    file = torch_file(tmp_path / "given.pth", ENCODER)
    files.write(f"{s3}/given.pth", file.read_bytes())
    local = states(open_trainer(recipe(tiny_data, tmp_path / "run", file)))
    ours = states(open_trainer(recipe(tiny_data, f"{s3}/run", f"{s3}/given.pth")))
    assert equal(ours, local, "")
    for path in sorted(parent.rglob("*")):
        if path.is_file() and "lease" not in path.parts:
            files.write(f"{s3}/parent/{path.relative_to(parent)}", path.read_bytes())
    ours = states(open_trainer(recipe(tiny_data, f"{s3}/run", f"{s3}/parent")))
    assert equal(ours, states(open_trainer(recipe(tiny_data, parent))), "")
