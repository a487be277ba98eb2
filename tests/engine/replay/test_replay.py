"""--replay: the step that was, from its number; whatever else was in the run stays as it is."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from engine.data import open_data
from engine.log.terminal import Terminal
from engine.method import augment, precision
from engine.method.byol import byol_loss
from engine.processes.parallel import ParallelConfig
from engine.processes.world import join
from engine.recipe import Recipe
from engine.replay.check import check_replay
from engine.replay.report import replay
from engine.replay.samples import find_block
from engine.replay.sheets import draw_sheet
from engine.replay.watch import Watch
from engine.state import checkpoint
from engine.state.checkpoint import CheckpointConfig
from engine.trainer import Trainer
from shards import index as indexes
from shards.decode import crop_resize
from shards.errors import InputError
from shards.index import Index
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.reader import BlockReader
from shards.storage import files
from shards.views import Column
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import open_trainer, train

pytestmark = pytest.mark.versions


def replayed(recipe: Recipe, step: int) -> dict[str, Any]:
    replay_alone(recipe, step)
    summary: dict[str, Any] = json.loads((folder(recipe, step) / "summary.json").read_text())
    return summary


def folder(recipe: Recipe, step: int) -> Path:
    return Path(recipe.run) / "replay" / f"step_{step:08d}"


def table(recipe: Recipe, step: int, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder(recipe, step) / name).read_text().splitlines()))


def line(recipe: Recipe, step: int) -> dict[str, Any]:
    lines = (Path(recipe.run) / "metrics.jsonl").read_text().splitlines()
    return next(found for found in map(json.loads, lines) if found["step"] == step)


def contents(run: str) -> dict[str, bytes]:
    found = {str(path): path for path in Path(run).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if "/replay/" not in name}


@pytest.fixture(scope="module")
def recipe(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of 11 steps, saved at 4, 8 and 11, of which all checkpoints stay."""
    run = tmp_path_factory.mktemp("run")
    made = tiny.recipe(tiny_data, run, steps=11, probe=tiny.NO_PROBE, batch=BatchConfig(16, 2))
    train(made)
    return made


@pytest.mark.parametrize(
    ("step", "weights"),
    [
        (1, "of the start"),
        (3, "of the start, trained 2 steps further"),
        (5, "of the checkpoint of step 4"),
        (7, "of the checkpoint of step 4, trained 2 steps further"),
    ],
)
def test_the_step_is_the_same_bit_for_bit(recipe: Recipe, step: int, weights: str) -> None:
    before = contents(recipe.run)
    found = replayed(recipe, step)
    assert contents(recipe.run) == before
    assert found["exact"]
    assert found["weights"] == f"{weights}: those that the step had"
    logged = line(recipe, step)
    for key in ("loss", "head_loss", "lr", "tau", "feature_std", "epoch", "skipped"):
        assert found["replayed"][key] == logged[key], key
    assert (found["data"], found["loss_difference"]) == ("equal", 0.0)
    assert found["data_digest"] == logged["data_digest"]
    for key in ("grad_norm", "update_ratio"):
        assert found["replayed"][key] == pytest.approx(logged[key], rel=1e-4), key
    assert found["first_not_finite"] is None
    rows = table(recipe, step, "images.csv")
    assert np.mean([float(row["loss"]) for row in rows]) == pytest.approx(logged["loss"], 1e-5)
    heads = np.mean([float(row["head_loss"]) for row in rows])
    assert heads == pytest.approx(logged["head_loss"], 1e-5)


def test_older_weights_are_called_so(recipe: Recipe) -> None:
    found = replayed(dataclasses.replace(recipe, replay_forward=2), 8)
    assert not found["exact"]
    assert (
        "step 4, 3 steps before: losses and gradients are not those of the run" in found["weights"]
    )
    logged = line(recipe, 8)
    assert found["data"] == "equal"
    assert found["replayed"]["lr"] == logged["lr"]
    assert found["loss_difference"] != 0


def test_a_step_that_is_not_in_the_log_yet(recipe: Recipe) -> None:
    found = replayed(recipe, 13)
    assert (found["exact"], found["data"], found["logged"]) == (True, "not logged", None)


def test_pixels_are_compared_too(tiny_data: DataConfig, tmp_path: Path) -> None:
    audited = dataclasses.replace(tiny_data, audit=True)
    recipe = tiny.recipe(audited, tmp_path, steps=2, probe=tiny.NO_PROBE)
    train(recipe)
    assert replayed(recipe, 2)["data"] == "equal, pixels too"
    journal = tmp_path / "metrics.jsonl"
    digest = line(recipe, 2)["data_digest"]
    journal.write_text(journal.read_text().replace(digest, "0" * 16))
    assert replayed(recipe, 2)["data"] == "other samples"


def test_gradients_are_those_of_plain_torch(recipe: Recipe) -> None:
    """The norm of each layer's gradient, from a step written out again, in micro-batches."""
    replayed(recipe, 5)
    trainer = open_trainer(dataclasses.replace(recipe, run=f"{recipe.run}-none"))
    trainer.load(checkpoint.verify(checkpoint.step_url(recipe.run, 4), trainer.world))
    trainer.step = 4
    batches = trainer.batches()
    batch = next(batches)
    batches.close()
    losses = []
    for part in range(2):
        rows = slice(8 * part, 8 * part + 8)
        views, params = (t[:, rows].flatten(0, 1) for t in (batch.views, batch.params))
        images = augment.augment(views, params)
        output = trainer.online(images)
        loss = byol_loss(output.prediction, trainer.target(images))
        losses += loss.tolist()
        assert output.logits is not None
        head = torch.nn.functional.cross_entropy(output.logits, batch.labels[rows])
        ((loss.mean() + head) / 2).backward()
    found = {row["layer"]: float(row["gradient_norm"]) for row in table(recipe, 5, "layers.csv")}
    for name, parameter in trainer.online.named_parameters():
        assert parameter.grad is not None
        assert found[name] == pytest.approx(parameter.grad.norm().item(), rel=1e-5, abs=1e-9), name
    rows_there = table(recipe, 5, "images.csv")
    assert [float(row["loss"]) for row in rows_there] == pytest.approx(losses, rel=1e-6)
    assert [int(row["sample"]) for row in rows_there] == batch.ids.tolist()


def test_names_labels_and_pictures(recipe: Recipe) -> None:
    replayed(recipe, 2)
    index = indexes.load(recipe.data.train, "data.train")
    rows = table(recipe, 2, "images.csv")
    assert len(rows) == 16
    for row in rows:
        assert index.classes[int(row["label"])] == row["class"]
        assert row["class"] in row["key"]
        shard, _ = find_block(index, int(row["sample"]))
        assert index.shards[shard].name == row["shard"]
        for view in ("view1", "view2"):
            assert 0 < int(row[f"{view}_width"]) <= 32
            assert row[f"{view}_flip"] in "01"
    (sheet,) = folder(recipe, 2).glob("views_*.png")
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (2 * (96 + 20), 8 * (2 * 98 + 6), 3)


@pytest.mark.parametrize("step", [6, 7])  # the last of an epoch, and the first of the next
def test_crops_are_those_of_the_views(recipe: Recipe, step: int) -> None:
    """The written boxes, cut from the images again, are the pixels of the batch."""
    replayed(dataclasses.replace(recipe, replay_forward=0), step)
    trainer = open_trainer(dataclasses.replace(recipe, run=f"{recipe.run}-none"))
    trainer.step = step - 1
    batches = trainer.batches()
    batch = next(batches)
    batches.close()
    reader = BlockReader(trainer.data.train)
    for number, row in enumerate(table(recipe, step, "images.csv")):
        place = find_block(trainer.data.train, int(row["sample"]))
        block = reader.fetch(*place)
        position = int(row["sample"]) - trainer.data.train.first_id(*place)
        assert block.samples[position].key == row["key"]
        image = reader.decode(block, position)
        for view, name in enumerate(("view1", "view2")):
            top, left, height, width = (
                int(row[f"{name}_{side}"]) for side in ("top", "left", "height", "width")
            )
            cut = crop_resize(image, (top, left, height, width), 32)
            assert torch.equal(cut, batch.views[view, number])
            params = batch.params[view, number]
            assert float(row[f"{name}_hue"]) == params[Column.FACTORS + 3].item()
            assert float(row[f"{name}_blur_sigma"]) == params[Column.SIGMA].item()
            assert int(row[f"{name}_solarize"]) == params[Column.SOLARIZE].item()


def test_a_sheet_shows_both_views() -> None:
    pictures = np.zeros((2, 10, 48, 48, 3), np.uint8)
    pictures[0, 9], pictures[1, 9] = (255, 0, 0), (0, 0, 255)
    sheet = draw_sheet(pictures, [str(number) for number in range(10)])
    assert sheet.shape == (2 * 116, 8 * 202, 3)  # enlarged twice
    left, top = 202, 116 + 14  # the second image of the second row
    assert (sheet[top : top + 96, left : left + 96] == (255, 0, 0)).all()
    assert (sheet[top : top + 96, left + 98 : left + 194] == (0, 0, 255)).all()
    assert (sheet[top + 1, left + 203] == 255).all()  # nothing is there


def test_blocks_of_samples(packed: Index) -> None:
    for shard in range(len(packed.shards)):
        for block, (_, count) in enumerate(packed.blocks(shard)):
            first = packed.first_id(shard, block)
            for sample in (first, first + count - 1):
                assert find_block(packed, int(sample)) == (shard, block)


def replay_alone(recipe: Recipe, step: int) -> None:
    world = join(recipe.threads, recipe.parallel.strategy != "auto")
    terminal = Terminal(world.main)
    replay(recipe, step, world, open_data(recipe, world, terminal.say), terminal)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes(
    strategy: Any, tiny_data: DataConfig, tmp_path: Path, ranks: Ranks
) -> None:
    """Three processes with 2, 1 and 1 of 4 streams, and one process alone."""
    config = ParallelConfig(strategy=strategy)
    recipe = tiny.recipe(tiny_data, tmp_path, steps=3, probe=tiny.NO_PROBE, parallel=config)
    recipe = dataclasses.replace(recipe, checkpoint=CheckpointConfig(every=2))
    ranks.run(train, recipe, size=3)
    before = contents(recipe.run)
    ranks.run(replay_alone, recipe, 3, size=3)
    assert contents(recipe.run) == before
    found = json.loads((folder(recipe, 3) / "summary.json").read_text())
    there = table(recipe, 3, "images.csv"), table(recipe, 3, "layers.csv")
    assert (found["processes"], found["images"]) == (3, 16)
    assert (found["data"], found["loss_difference"]) == ("equal", 0.0)
    assert len(list(folder(recipe, 3).glob("views_*.png"))) == 3
    alone = replayed(dataclasses.replace(recipe, parallel=ParallelConfig()), 3)
    assert len(list(folder(recipe, 3).glob("views_*.png"))) == 1  # the earlier ones are gone
    assert alone["data"] == "equal"
    assert alone["replayed"]["loss"] == pytest.approx(found["replayed"]["loss"], rel=1e-5)
    here = table(recipe, 3, "images.csv"), table(recipe, 3, "layers.csv")
    losses = [{row["sample"]: float(row["loss"]) for row in rows} for rows, _ in (there, here)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for a, b in zip(there[1], here[1], strict=True):
        assert a["layer"] == b["layer"]
        for norm in ("gradient_norm", "weight_norm", "update_norm"):
            assert float(a[norm]) == pytest.approx(float(b[norm]), rel=1e-3, abs=1e-6)


def test_a_branch_and_its_first_step(recipe: Recipe, tmp_path: Path) -> None:
    """The weights of the first steps are the parent's, as long as the branch has none before."""
    branch = CheckpointConfig(every=0, branch=f"{recipe.run}/checkpoints/step_00000004")
    child = dataclasses.replace(recipe, run=str(tmp_path / "child"), checkpoint=branch, steps=7)
    train(child)
    assert checkpoint.steps(child.run) == [7]
    for step in (5, 7):
        found = replayed(child, step)
        assert found["exact"]
        assert (found["data"], found["loss_difference"]) == ("equal", 0.0)
    alone = dataclasses.replace(child, checkpoint=CheckpointConfig())  # as after the first step
    for step in (1, 4):
        assert "began at step 4 of another run" in refused(alone, step)
    check(alone, 5)


def test_a_run_that_is_not_there_or_another_one(recipe: Recipe, tmp_path: Path) -> None:
    """It is found before data is read, and no images are drawn."""
    assert "there is no run at" in refused(dataclasses.replace(recipe, run=f"{tmp_path}/no"), 1)
    nowhere = dataclasses.replace(recipe.data, train=f"{tmp_path}/none", val="", draw=64)
    other = dataclasses.replace(recipe, data=nowhere, replay=1, seed=5)
    assert "seed: there 0, here 5" in refused(other, 1)
    with pytest.raises(InputError, match=f"^data.train {tmp_path}/none"):
        open_data(other, join(1, False), print)
    assert list(tmp_path.iterdir()) == []


def check(recipe: Recipe, step: int) -> None:
    world = join(recipe.threads, recipe.parallel.strategy != "auto")
    check_replay(recipe, step, world, Terminal(world.main))


def refused(recipe: Recipe, step: int) -> str:
    with pytest.raises(InputError) as caught:
        check(recipe, step)
    return str(caught.value)


def test_a_run_in_a_bucket(tiny_data: DataConfig, s3: str) -> None:
    recipe = tiny.recipe(tiny_data, f"{s3}/run", steps=3, probe=tiny.NO_PROBE)
    train(recipe)
    before = sorted(files.walk(f"{s3}/run"))
    for _ in range(2):
        replay_alone(recipe, 3)
    new = sorted(set(files.walk(f"{s3}/run")) - set(before))
    assert sorted(set(before) - set(files.walk(f"{s3}/run"))) == []
    names = ["images.csv", "layers.csv", "summary.json", "views_000000.png"]
    assert [name for name, _ in new] == [f"replay/step_00000003/{name}" for name in names]
    summary = files.read_json(f"{s3}/run/replay/step_00000003/summary.json")
    assert (summary["exact"], summary["loss_difference"]) == (True, 0.0)


# What is not finite


def watched(recipe: Recipe, spoil: Callable[[Trainer], None]) -> str | None:
    """Watch the first step of a run, after `spoil` has changed its trainer."""
    trainer = open_trainer(recipe)
    batches = trainer.batches()
    batch = next(batches)
    batches.close()
    spoil(trainer)
    with Watch(trainer, batch) as watch:
        trainer.train_step(batch)
    return None if watch.not_finite is None else watch.not_finite.text


def new(tiny_data: DataConfig, tmp_path: Path, **changes: Any) -> Recipe:
    return tiny.recipe(tiny_data, tmp_path / "new", probe=tiny.NO_PROBE, **changes)


def test_all_is_finite(tiny_data: DataConfig, tmp_path: Path) -> None:
    assert watched(new(tiny_data, tmp_path), lambda _: None) is None


def test_a_weight_that_is_not_finite(tiny_data: DataConfig, tmp_path: Path) -> None:
    def spoil(trainer: Trainer) -> None:
        weight = trainer.target.get_parameter("encoder.layer2.0.conv1.weight")
        weight.data[0, 0, 0, 0] = torch.nan

    text = watched(new(tiny_data, tmp_path), spoil)
    assert text is not None
    assert text.startswith("target.encoder.layer2.0.conv1.weight before the step")
    assert "1 of " in text


def test_an_image_that_is_not_finite(tiny_data: DataConfig, tmp_path: Path) -> None:
    ids: list[int] = []

    def spoil(trainer: Trainer) -> None:
        batches = trainer.batches()
        ids.extend(next(batches).ids.tolist())
        batches.close()
        good = trainer.augment

        def bad(views: Tensor, params: Tensor) -> Tensor:
            images = good(views, params)
            images[8 + 3] = torch.inf  # the second view of the fourth image
            return images

        trainer.augment = bad

    recipe = new(tiny_data, tmp_path, batch=BatchConfig(16, 2))
    text = watched(recipe, spoil)
    assert text is not None
    assert text.startswith("the augmented images (16x3x32x32)")
    assert text.endswith(f", in view 2 of sample {ids[3]}")


def test_an_activation_that_is_not_finite(tiny_data: DataConfig, tmp_path: Path) -> None:
    def spoil(trainer: Trainer) -> None:
        trainer.online.get_parameter("encoder.layer3.0.bn1.weight").data.fill_(3e38)

    text = watched(new(tiny_data, tmp_path), spoil)
    assert text is not None
    assert text.startswith("the output of online.encoder.layer3.0.bn1 (")


def test_a_gradient_that_is_not_finite(tiny_data: DataConfig, tmp_path: Path) -> None:
    """In the order of the backward pass: the layer nearest to the loss is named."""

    def explode(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.inf)

    def spoil(trainer: Trainer) -> None:
        trainer.online.get_submodule("encoder.layer4.0.conv2").register_forward_hook(explode)

    text = watched(new(tiny_data, tmp_path), spoil)
    assert text is not None
    assert text.startswith("the gradient at the output of online.encoder.layer4.0.conv2 (")


def test_a_gradient_of_a_weight_alone(tiny_data: DataConfig, tmp_path: Path) -> None:
    def spoil(trainer: Trainer) -> None:
        weight = trainer.online.get_parameter("encoder.layer2.0.conv2.weight")
        weight.register_hook(lambda gradient: gradient * torch.inf)

    text = watched(new(tiny_data, tmp_path), spoil)
    assert text == "the gradient of online.encoder.layer2.0.conv2.weight"


def test_the_bad_gradient_nearest_to_the_loss_is_named(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    """Of a weight's and, further from the loss, an output's."""

    def explode(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.inf)

    def spoil(trainer: Trainer) -> None:
        trainer.online.get_submodule("encoder.layer2.0.bn1").register_forward_hook(explode)
        weight = trainer.online.get_parameter("projector.0.weight")
        weight.register_hook(lambda gradient: gradient * torch.inf)

    text = watched(new(tiny_data, tmp_path), spoil)
    assert text == "the gradient of online.projector.0.weight"


def test_a_skipped_step_is_explained(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first loss scale is too large for this network."""
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**13)
    recipe = new(tiny_data, tmp_path, steps=4, precision="fp16")
    train(recipe)
    counts = [0, *(line(recipe, step)["skipped"] for step in range(1, 5))]
    skipped = [step for step in range(1, 5) if counts[step] > counts[step - 1]]
    assert 0 < len(skipped) < 4
    for step in range(1, 5):
        found = replayed(recipe, step)
        assert found["exact"]
        assert found["data"] == "equal"
        assert found["loss_difference"] == 0
        assert found["skipped"] == (step in skipped)
        assert ("gradient" in (found["first_not_finite"] or "")) == (step in skipped)


# Mistakes


def test_a_step_that_cannot_be(recipe: Recipe, tiny_data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="replay 21: the run has only 20 steps"):
        replayed(recipe, 21)
    child = tiny.recipe(
        tiny_data,
        tmp_path / "child",
        probe=tiny.NO_PROBE,
        batch=BatchConfig(16, 2),
        checkpoint=CheckpointConfig(resume=f"{recipe.run}/checkpoints/step_00000008"),
    )
    with pytest.raises(InputError, match="the run began at step 8 of another run"):
        replayed(child, 5)
    assert not (tmp_path / "child").exists()
    assert replayed(child, 9)["exact"]
