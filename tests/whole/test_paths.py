"""The whole way of a recipe's encoder: train, measure, export, load in torchvision, compare."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from engine.encoder import card as card_module
from engine.encoder.source import EncoderConfig, open_encoder
from engine.log import journal
from engine.method.augment import normalize
from engine.processes.world import World
from engine.state import checkpoint
from launch import evaluate, export, train
from shards import index as indexes
from shards.center_crops import CropReader, EvalBatch
from shards.making import synthetic

pytestmark = pytest.mark.versions

ALONE = World(0, 1, 1, torch.device("cpu"))


def ignore(_: str) -> None:
    pass


def crops(where: Path, card: dict[str, Any]) -> Iterator[EvalBatch]:
    """data.val as the card says."""
    given = card["input"]
    fraction = given["center_crop"] / given["resize_shorter_side"]
    reader = CropReader(given["size"], fraction, threads=1, corrupt=0.0, report=ignore)
    return reader.read(indexes.load(f"{where}/data/val", "data.val"))


def head_of(run: str, name: str) -> dict[str, torch.Tensor]:
    """The linear classifier that has this figure."""
    results = Path(run).glob("evaluations/**/linear-*/result.json")
    (path,) = [p for p in results if name in json.loads(p.read_text())["metrics"]]
    return load_file(path.parent / "head.safetensors")


@pytest.mark.parametrize("recipe", ["quickstart", "cifar10"])
def test_from_training_to_torchvision(
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, samples in (("train", 104), ("val", 40)):
        synthetic.write(f"{tmp_path}/data/{name}", samples, 32, seed=0)
    data = ["--data.train", f"{tmp_path}/data/train", "--data.val", f"{tmp_path}/data/val"]
    run = f"{tmp_path}/run"
    small = ["--steps", "2", "--batch.size", "32", "--no-compile", "--threads", "1"]
    small += ["--model.encoder.width", "0.25", "--model.hidden", "256"]  # bf16 is slow on some CPUs
    off = ["--probe.every", "0", "--probe.no-baseline", "--checkpoint.every", "0"]
    recipe_file = str(Path(train.__file__).parent.parent / "recipes" / f"{recipe}.py")
    assert train.main([recipe_file, *data, *small, *off, "--run", run]) == 0

    few = ["--threads", "1", "--batch", "32", "--epochs", "1"]
    assert evaluate.main(["linear", run, *few]) == 0
    assert evaluate.main(["linear", run, "--fast", *few]) == 0
    assert evaluate.main(["knn", run, "--threads", "1"]) == 0
    assert evaluate.main(["finetune", run, "--lr", "0.1", *few]) == 0
    semi = ["semi-supervised", run, "--fraction", "0.4", "--lr", "0.1", *few]
    assert evaluate.main(semi) == 0
    assert evaluate.main(["neighbours", run, "--queries", "2", "--threads", "1"]) == 0
    assert len(list(Path(run).glob("evaluations/**/result.json"))) == 5

    for network in ("online", "target"):
        out = Path(tmp_path, "export", network)
        assert export.main([run, str(out), "--network", network]) == 0
        card = json.loads((out / "card.json").read_text())
        assert card["metrics"] == journal.read(run)[-1]
        assert card["compared_on_images"] == 16
        # As a user without this package: the card's lines, torchvision, a file.
        names: dict[str, torchvision.models.ResNet] = {}
        exec("\n".join(card["build"]), names)
        model = names["model"]
        model.load_state_dict(load_file(out / "encoder.safetensors"))
        model.eval()
        images = normalize(next(crops(tmp_path, card)).images.float() / 255)
        _, encoder = open_encoder(run, EncoderConfig(network=network), ALONE, ignore)
        traced = torch.jit.load(out / "encoder.ts")
        with torch.no_grad():
            expected = encoder.eval()(images)
            torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(traced(images), expected, rtol=1e-5, atol=1e-6)
        if network == "online":
            # The linear classifiers' figures, from the exported files alone.
            batches = list(crops(tmp_path, card))
            labels = torch.cat([batch.labels for batch in batches])
            for name in ("linear_top1", "linear_fast_top1"):
                model.fc = torch.nn.Linear(card["features"], len(synthetic.CLASSES))
                model.fc.load_state_dict({k[3:]: v for k, v in head_of(run, name).items()})
                with torch.no_grad():
                    guesses = [model(normalize(b.images.float() / 255)).argmax(1) for b in batches]
                top1 = (torch.cat(guesses) == labels).double().mean().item()
                # bf16 was used
                assert card["metrics"][name] == pytest.approx(top1, abs=1.01 / len(labels))
        wrong = lambda *_: 1e-3  # noqa: E731
        with monkeypatch.context() as planted:
            planted.setattr(card_module, "verify", wrong)
            assert export.main([run, f"{tmp_path}/wrong"]) == 1
        assert "its features differ from the checkpoint's by 1.0e-03" in capsys.readouterr().err
        assert not list(Path(tmp_path, "wrong").glob("*"))
    online, target = (
        load_file(tmp_path / "export" / network / "encoder.safetensors")["conv1.weight"]
        for network in ("online", "target")
    )
    assert not torch.equal(online, target)
    # The weights are those of the checkpoint, and the export is a source like any other.
    commit = checkpoint.find(run, ALONE, ignore)
    state = {"online": {"encoder.conv1.weight": torch.empty_like(online)}}
    checkpoint.load(commit, state, ALONE)
    assert torch.equal(state["online"]["encoder.conv1.weight"], online)
    file = f"{tmp_path}/export/online/encoder.pth"
    knn = ["--size", "32", "--crop", "1.0", "--k", "20", "--precision", "bf16", "--threads", "1"]
    assert evaluate.main(["knn", file, *knn, *data, "--out", f"{tmp_path}/of_file"]) == 0
    assert evaluate.main(["knn", run, *knn, "--out", f"{tmp_path}/of_run"]) == 0
    tables = [json.loads(p.read_text())["table"] for p in tmp_path.glob("of_*/**/result.json")]
    assert len(tables) == 2
    assert tables[0] == tables[1]
