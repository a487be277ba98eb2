"""A branch: a new run from another run's full state, with changed method fields."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.evaluation.during_training import ProbeConfig
from engine.log import journal
from engine.method.adamw import AdamWConfig
from engine.method.byol import BYOLConfig
from engine.method.lars import LARSConfig
from engine.method.local_shards import whole
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.processes.world import World
from engine.recipe import Recipe
from engine.state import checkpoint
from engine.state.checkpoint import CheckpointConfig
from engine.trainer import Trainer
from shards.errors import InputError
from shards.index import Index
from shards.loader import DataConfig
from shards.making import synthetic
from shards.order import BatchConfig
from shards.storage import files
from tests.engine.processes.test_world import recipe as spread
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, open_trainer, training

ALONE = World(0, 1, 1, torch.device("cpu"))
SHORT, LONG = 5, 8  # epochs of 104 images in batches of 16: 6.5 steps each
OPTIMIZERS: dict[str, LARSConfig | AdamWConfig] = {"lars": LARSConfig(), "adamw": AdamWConfig()}
RATES = {"lars": 2.0, "adamw": 2e-2}


def recipe(data: DataConfig, run: Path | str, epochs: float = SHORT, **changes: Any) -> Recipe:
    """Return a recipe of the tiny network that is evaluated never and saved at its end."""
    given = {
        "schedule": ScheduleConfig(epochs=epochs, warmup="1 epoch", base_lr=2.0),
        "probe": tiny.NO_PROBE,
        "checkpoint": CheckpointConfig(every=0),
    }
    return tiny.recipe(data, run, **given | changes)


def train(config: Recipe) -> Trainer:
    with training(config) as trainer:
        finish(trainer)
    return trainer


def branch(of: Path | str, every: int = 0) -> CheckpointConfig:
    return CheckpointConfig(every=every, branch=str(of))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def origin_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "recipe.json").read_text())["branched_from"]
    return found


def tensors(state: dict[str, Any], path: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        more = tensors(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
        found |= more
    return found


def assert_same_state(ours: Trainer, other: Trainer) -> None:
    mine, theirs = tensors(ours.state()), tensors(other.state())
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@torch.no_grad()
def copy_state(source: Trainer, into: Trainer) -> None:
    """Copy all tensors of a trainer that has trained, without any saving and loading."""
    for ours, theirs in ((into.online, source.online), (into.target, source.target)):
        ours.load_state_dict(theirs.state_dict())
    pairs = zip(into.online.parameters(), source.online.parameters(), strict=True)
    for mine, other in pairs:
        for name, value in into.optimizer.state[mine].items():
            value.copy_(source.optimizer.state[other][name])
    for name, value in into.guard.state().items():
        value.copy_(source.guard.state()[name])


def set_out(config: Recipe, parent: Trainer) -> Trainer:
    """Train by the definition: the parent's tensors, put by hand into a run of the new recipe."""
    trainer = open_trainer(config)
    copy_state(parent, trainer)
    trainer.step = parent.step
    batches = trainer.batches()
    while trainer.step < trainer.total_steps:
        trainer.train_step(next(batches))
    batches.close()
    return trainer


@pytest.fixture(scope="module", params=OPTIMIZERS)
def parent(
    request: pytest.FixtureRequest, tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Trainer]:
    """The name of an optimizer, and a run by it of 5 epochs, which is stopped at step 20."""
    run = tmp_path_factory.mktemp(request.param)
    trainer = train(optimized(request.param, recipe(tiny_data, run, steps=20)))
    return request.param, run, trainer


def optimized(name: str, config: Recipe) -> Recipe:
    schedule = dataclasses.replace(config.schedule, base_lr=RATES[name])
    return dataclasses.replace(config, optimizer=OPTIMIZERS[name], schedule=schedule)


def test_a_prolonged_run_is_what_its_definition_says(
    parent: tuple[str, Path, Trainer], tiny_data: DataConfig, tmp_path: Path
) -> None:
    """The tensors of step 20, the rates of the new recipe from there on, and the same order."""
    name, there, stopped = parent
    plain = optimized(name, recipe(tiny_data, tmp_path / "plain", LONG))
    run = tmp_path / "branch"
    config = dataclasses.replace(plain, run=str(run), checkpoint=branch(there))
    trained = train(config)
    assert trained.total_steps == 52  # 8 * 104 / 16
    assert_same_state(trained, set_out(plain, stopped))

    peak, warmup, total = RATES[name] * 16 / 256, 6, 52
    first, *records = lines(run)
    assert first == {"step": 20, "branched_from": f"step 20 of {there}/checkpoints/step_00000020"}
    assert [record["step"] for record in records] == list(range(21, 53))
    for record in records:
        k = record["step"] - 1
        cosine = math.cos(math.pi * (k - warmup) / (total - warmup))
        assert record["lr"] == pytest.approx(peak * (1 + cosine) / 2, rel=1e-12)
        tau = 1 - (1 - 0.996) * (math.cos(math.pi * k / total) + 1) / 2
        assert record["tau"] == pytest.approx(tau, rel=1e-12)
    whole = train(optimized(name, recipe(tiny_data, tmp_path / "whole", LONG, steps=22)))
    order = [line["data_digest"] for line in lines(tmp_path / "whole")[20:]]
    assert [record["data_digest"] for record in records[:2]] == order
    assert whole.step == 22


def test_a_branch_tells_and_keeps_where_it_comes_from(
    parent: tuple[str, Path, Trainer],
    tiny_data: DataConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, there, _ = parent
    run, commit = tmp_path / "run", checkpoint.find(str(there), ALONE, print)
    config = optimized(name, recipe(tiny_data, run, LONG, checkpoint=branch(there), steps=21))
    train(config)
    said = capsys.readouterr().out.replace("\n", "")
    assert "schedule.epochs: there 5, here 8" in said
    assert "the order of the images continues" in said
    found = origin_of(run)
    assert found["url"] == commit.url
    assert (found["step"], found["step_here"], found["digest"]) == (20, 20, commit.digest)
    assert found["changed"] == {"schedule.epochs": {"there": 5, "here": 8}}


def test_a_branch_goes_on_without_its_parent(tiny_data: DataConfig, tmp_path: Path) -> None:
    there, run, whole = (tmp_path / name for name in ("parent", "run", "whole"))
    train(recipe(tiny_data, there, steps=3))
    schedule = ScheduleConfig(epochs=2, warmup=0, rewarm="1 epoch")
    config = recipe(tiny_data, run, schedule=schedule, checkpoint=branch(there))
    undisturbed = train(dataclasses.replace(config, run=str(whole)))
    train(dataclasses.replace(config, steps=5))
    kept = origin_of(run)
    shutil.rmtree(there)
    assert_same_state(train(config), undisturbed)
    assert origin_of(run) == kept
    assert lines(run)[0]["branched_from"].startswith("step 3 of")
    commit = checkpoint.find(str(run), ALONE, print)
    assert commit.origin.branched_from is not None
    assert commit.origin.branched_from.step_here == 3
    rates = [line["lr"] for line in lines(run)[1:]]
    peak = 0.2 * 16 / 256
    for k, rate in enumerate(rates, start=3):  # a ramp of 6 steps from step 3 on
        cosine = peak * (1 + math.cos(math.pi * k / 13)) / 2
        assert rate == pytest.approx(cosine * min(1, (k - 3) / 6), rel=1e-12)


def test_a_branch_of_a_branch(tiny_data: DataConfig, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    train(recipe(tiny_data, first, steps=2))
    train(recipe(tiny_data, second, 6, checkpoint=branch(first), steps=4))
    train(recipe(tiny_data, third, 7, checkpoint=branch(second), steps=6))
    assert origin_of(third)["url"].endswith("second/checkpoints/step_00000004")
    assert [line["step"] for line in lines(third)] == [4, 5, 6]


def test_another_batch_and_data_set_keep_the_position_in_epochs(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, run = tmp_path / "parent", tmp_path / "run"
    train(recipe(tiny_data, there, steps=13))  # 13 * 16 / 104 = 2 epochs
    synthetic.write(str(tmp_path / "more"), 160, 32, seed=2)
    data = dataclasses.replace(tiny_data, train=str(tmp_path / "more"))
    config = recipe(data, run, batch=BatchConfig(size=8), checkpoint=branch(there), steps=41)
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().out.replace("\n", "")
    found = origin_of(run)
    assert (found["step"], found["step_here"]) == (13, 40)  # 2 epochs of 160 / 8
    assert found["changed"].keys() == {"batch.size", "digest of data.train"}
    assert "begins anew with step 40 (data.train, batch.size changed)" in said
    assert [line["step"] for line in lines(run)] == [40, 41]
    train(dataclasses.replace(config, steps=42))
    assert lines(run)[-1]["step"] == 42


def test_a_head_of_other_classes_and_another_optimizer_begin_anew(
    packed: Index, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "parent"
    train(recipe(tiny_data, there, steps=2))
    data = DataConfig(train=packed.url, streams=4)
    config = recipe(data, tmp_path / "run", checkpoint=branch(there), optimizer=AdamWConfig())
    trainer = open_trainer(config)
    said = capsys.readouterr().out.replace("\n", "")
    assert "the online head is drawn anew: 8 classes there, 3 here" in said
    assert "the optimizer begins anew" in said
    state = tensors(trainer.state())
    loaded = tensors(open_trainer(recipe(tiny_data, there)).state())
    same = {n for n in state if n in loaded and torch.equal(state[n], loaded[n])}
    networks = {n for n in loaded if n.startswith(("online.", "target.")) and "classifier" not in n}
    assert networks <= same
    assert not any(t.any() for n, t in state.items() if n.startswith("optimizer."))
    trainer.train_step(next(trainer.batches()))


@pytest.mark.parametrize(
    ("changes", "anew"),
    [({}, False), ({"options": ("alpha=0.9", "momentum=0.5")}, True), ({"adapt": True}, True)],
    ids=str,
)
def test_an_optimizer_with_other_state_begins_anew(
    tiny_data: DataConfig, tmp_path: Path, changes: dict[str, Any], anew: bool
) -> None:
    """Torch's RMSprop has one tensor more with momentum, and adapted gradients are shorter."""
    there, rmsprop = tmp_path / "parent", TorchOptimizerConfig("RMSprop")
    train(recipe(tiny_data, there, steps=2, optimizer=rmsprop))
    optimizer = TorchOptimizerConfig("RMSprop", weight_decay=0.1, **changes)
    config = recipe(tiny_data, tmp_path / "run", checkpoint=branch(there), optimizer=optimizer)
    trainer = open_trainer(config)
    state = tensors(trainer.state())
    moved = [t.any().item() for n, t in state.items() if n.endswith(".square_avg")]
    assert moved
    assert not any(moved) if anew else all(moved)
    trainer.train_step(next(trainer.batches()))


def test_what_a_branch_cannot_change_is_refused(tiny_data: DataConfig, tmp_path: Path) -> None:
    there, run = tmp_path / "parent", tmp_path / "run"
    train(recipe(tiny_data, there, steps=4))
    encoder = ResNetConfig(depth=18, width=0.125)
    model = BYOLConfig(encoder=encoder, hidden=64, projection=16)
    short = ScheduleConfig(epochs=0.6, warmup=0)
    for changes, text in (
        ({"model": model}, r"give --model.encoder.depth 10 --model.hidden 32, or .*--model.start"),
        (
            {"schedule": short},
            r"begin at step 4, and the recipe ends at step 3: .*--schedule.epochs",
        ),
    ):
        with pytest.raises(InputError, match=text):
            train(recipe(tiny_data, run, checkpoint=branch(there), **changes))
        assert not (run / "recipe.json").exists()
    with pytest.raises(InputError, match=r"another --run-url and --checkpoint.branch"):
        train(recipe(tiny_data, there, 6))
    schedule = ScheduleConfig(rewarm="1 epoch")
    with pytest.raises(InputError, match=r"give --checkpoint.branch URL too"):
        train(recipe(tiny_data, run, schedule=schedule))
    file = tmp_path / "weights.pth"
    file.write_bytes(b"weights")
    with pytest.raises(InputError, match=rf"is a file.*give --model.start {file}"):
        train(recipe(tiny_data, run, checkpoint=branch(file)))
    with pytest.raises(InputError, match=rf"checkpoint.resume {file}: is a file.*--model.start"):
        train(recipe(tiny_data, run, checkpoint=CheckpointConfig(resume=str(file))))


def test_a_run_has_one_beginning(tiny_data: DataConfig, tmp_path: Path) -> None:
    there, run = tmp_path / "parent", tmp_path / "run"
    given = recipe(tiny_data, run)
    both = CheckpointConfig(branch=str(there), resume=str(there))
    with pytest.raises(InputError, match="exclude each other"):
        dataclasses.replace(given, checkpoint=both).check()
    for url in (
        run,
        f"{run}/",
        run / "checkpoints" / "step_00000004",
        tmp_path / "x" / ".." / "run",
    ):
        with pytest.raises(InputError, match="is of the run itself: give another --run-url"):
            dataclasses.replace(given, checkpoint=branch(url)).check()
    train(recipe(tiny_data, there, steps=2))
    train(recipe(tiny_data, run, steps=1))
    with pytest.raises(InputError, match="has begun without it"):
        train(recipe(tiny_data, run, checkpoint=branch(there)))
    train(recipe(tiny_data, tmp_path / "branch", checkpoint=branch(there), steps=3))
    with pytest.raises(InputError, match=r"branched from .*parent/checkpoints/step_00000002: give"):
        train(recipe(tiny_data, tmp_path / "branch", checkpoint=branch(run)))


def test_a_start_cut_off_keeps_to_its_place_in_the_parent(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    """The parent trains on, and the branch was killed before its first checkpoint."""
    there, run = tmp_path / "parent", tmp_path / "run"
    train(recipe(tiny_data, there, steps=2))
    config = recipe(tiny_data, run, 6, checkpoint=branch(there), steps=3)
    train(config)
    shutil.rmtree(run / "checkpoints")
    train(recipe(tiny_data, there, steps=4))
    with pytest.raises(InputError, match=r"no checkpoint to go on from: give --checkpoint.branch"):
        train(recipe(tiny_data, run, 6, steps=3))
    train(config)
    assert [line["step"] for line in lines(run)] == [2, 3]
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(there / "checkpoints" / "step_00000002")
    with pytest.raises(InputError, match=r"has no checkpoint yet: give another --run-url"):
        train(config)


def test_a_set_of_the_parent_without_its_length_counts_in_images(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    """Checkpoints of earlier versions do not know how many images there were."""
    there = tmp_path / "parent"
    train(recipe(tiny_data, there, steps=2))
    file = there / "checkpoints" / "step_00000002" / "commit.json"
    document = json.loads(file.read_text())
    del document["origin"]
    document["digest"] = checkpoint._digest(document)
    file.write_text(json.dumps(document))
    batch = BatchConfig(size=8)
    train(recipe(tiny_data, tmp_path / "run", batch=batch, checkpoint=branch(there), steps=5))
    assert origin_of(tmp_path / "run")["step_here"] == 4


@pytest.mark.parametrize(("changed", "kept"), [({}, True), ({"neighbours": 7}, False)])
def test_the_parents_baselines(
    changed: dict[str, Any],
    kept: bool,
    tiny_data: DataConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A branch that measures as its parent did compares itself with the same baselines."""
    probe = ProbeConfig(every=2, neighbours=5, baseline=True)
    parent = recipe(tiny_data, tmp_path / "parent", steps=2, probe=probe)
    train(parent)
    first, run = lines(tmp_path / "parent")[0], tmp_path / "run"
    keys = {"knn_pixels", "knn_untrained", "knn_chance"}
    assert (first["step"], first.keys() & keys) == (0, keys)
    capsys.readouterr()
    ours = dataclasses.replace(probe, **changed)
    child = recipe(tiny_data, run, steps=4, probe=ours, checkpoint=branch(tmp_path / "parent"))
    train(child)
    told, found = capsys.readouterr().out, lines(run)[0]
    assert (found["step"] == 0) is kept
    assert ("untrained encoder" in told) is kept
    assert [line["step"] for line in lines(run)][-3:] == [2, 3, 4]
    assert told.count("branched ") == 1
    if kept:
        assert {key: found[key] for key in keys} == {key: first[key] for key in keys}
    train(dataclasses.replace(child, steps=5))
    assert [line["step"] for line in lines(run)] == [0] * kept + [2, 3, 4, 5]


def branch_on_ranks(config: Recipe) -> tuple[int, dict[str, Any]]:
    """On a rank: the step and the whole tensors that a branch begins with; then it trains."""
    with training(config) as trainer:
        found = {name: whole(t).numpy().copy() for name, t in tensors(trainer.state()).items()}
        step = trainer.step
        finish(trainer)
    return step, found


def test_a_branch_of_several_processes(ranks: Ranks, tiny_data: DataConfig, tmp_path: Path) -> None:
    """From one process to two that shard the networks, with another batch and optimizer state."""
    there = spread(tiny_data, tmp_path / "parent", steps=2)
    train(there)
    expected = tensors(open_trainer(there).state())
    config = spread(tiny_data, tmp_path / "run", "fsdp", steps=6)
    config = dataclasses.replace(
        config, batch=BatchConfig(size=8), checkpoint=branch(tmp_path / "parent")
    )
    for step, found in ranks.run(branch_on_ranks, config, size=2):
        assert step == 6  # 2 * 24 / 8
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(torch.as_tensor(value), expected[name]), name


def test_a_branch_in_object_storage(tiny_data: DataConfig, s3: str) -> None:
    train(recipe(tiny_data, f"{s3}/parent", steps=2))
    config = recipe(tiny_data, f"{s3}/run", 6, checkpoint=branch(f"{s3}/parent"), steps=3)
    train(config)
    files.remove(f"{s3}/parent")
    train(dataclasses.replace(config, steps=4))
    found = [(line["step"], line.get("branched_from")) for line in journal.read(f"{s3}/run")]
    at = f"step 2 of {s3}/parent/checkpoints/step_00000002"
    assert found == [(2, at), (3, None), (4, None)]
