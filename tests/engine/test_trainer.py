"""Runs of the trainer: determinism, resuming, what they leave behind, how they stop."""

import contextlib
import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.debug import debug_step
from engine.evaluation.during_training import ProbeConfig
from engine.log.curves import VIEWS
from engine.log.metrics import TIMINGS, LogConfig
from engine.method import precision
from engine.method.schedule import ScheduleConfig
from engine.recipe import Recipe
from engine.state import lease
from engine.state.checkpoint import CheckpointConfig
from engine.trainer import StepOutput, Trainer
from shards.errors import InputError
from shards.index import Index
from shards.loader import Batch, DataConfig
from tests.conftest import PackFiles, draw_photo
from tests.helpers import tiny
from tests.helpers.training import finish, open_trainer, training

pytestmark = pytest.mark.versions


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def comparable(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines(run)]


def train(recipe: Recipe) -> Trainer:
    with training(recipe) as trainer:
        finish(trainer)
    return trainer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.glob("**/*") if path.is_file()}


def test_a_trainer_is_built_without_touching_storage(tiny_data: DataConfig, tmp_path: Path) -> None:
    open_trainer(tiny.recipe(tiny_data, tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    train(tiny.recipe(tiny_data, tmp_path / "run", steps=2, probe=tiny.NO_PROBE))
    before = contents(tmp_path)
    assert open_trainer(tiny.recipe(tiny_data, tmp_path / "run", probe=tiny.NO_PROBE)).step == 2
    assert contents(tmp_path) == before


def test_metrics_of_a_run(whole_run: Path) -> None:
    records = lines(whole_run)
    assert [record["step"] for record in records] == list(range(1, 21))
    steps_per_epoch = tiny.SAMPLES // 16
    for record in records:
        assert record["epoch"] == record["step"] // steps_per_epoch
        assert 0 <= record["loss"] <= 8
        assert {"images_per_second", "data_wait", "lr", "tau"} <= record.keys()
        assert {"feature_std", "data_digest", "grad_norm", "update_ratio"} <= record.keys()
        assert ("knn_top1" in record) == (record["step"] % 5 == 0)
        assert ("online_top1" in record) == (record["step"] % 5 == 0)
    assert len({record["data_digest"] for record in records}) == len(records)
    assert len(list(whole_run.glob("events.out.tfevents.*"))) == 1


def test_equal_runs_are_equal_bit_for_bit(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    train(tiny.recipe(tiny_data, tmp_path))
    assert comparable(tmp_path) == comparable(whole_run)


def test_a_loader_in_a_process_of_its_own_changes_nothing(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    data = dataclasses.replace(tiny_data, own_process=True)
    train(tiny.recipe(data, tmp_path, steps=7))
    assert comparable(tmp_path) == comparable(whole_run)[:7]


def test_another_seed_is_another_run(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, seed=1, steps=2))
    for ours, other in zip(comparable(tmp_path), comparable(whole_run)[:2], strict=True):
        assert ours["loss"] != other["loss"]
        assert ours["data_digest"] != other["data_digest"]


@pytest.mark.parametrize("stop", [4, 7])
def test_resumed_run_equals_the_whole_one(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path, stop: int
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, steps=stop))
    train(tiny.recipe(tiny_data, tmp_path))
    assert comparable(tmp_path) == comparable(whole_run)


def test_resumed_run_has_the_loss_scale(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first scale is too large for this network: it has changed before the stop."""
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**16)
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            run = tmp_path / name
            train(tiny.recipe(tiny_data, run, precision="fp16", steps=steps, probe=tiny.NO_PROBE))
    assert lines(tmp_path / "whole")[1]["skipped"] > 0
    assert comparable(tmp_path / "parts") == comparable(tmp_path / "whole")


def test_a_killed_run_repeats_what_was_not_saved(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, steps=7))
    # As a kill at step 7 leaves it: saved at 4, logged to 7, half a line more.
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000007")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    train(tiny.recipe(tiny_data, tmp_path))
    assert comparable(tmp_path) == comparable(whole_run)


@pytest.mark.parametrize("cut", ["half", "all"])
def test_lines_that_the_log_has_lost_are_told(
    whole_run: Path,
    tiny_data: DataConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    cut: str,
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, steps=8))
    log = tmp_path / "metrics.jsonl"
    kept = log.read_text().splitlines(keepends=True)[:3] if cut == "half" else []
    log.write_text("".join(kept))
    train(tiny.recipe(tiny_data, tmp_path))
    lost = "has lost its lines of steps"
    assert f"metrics.jsonl {lost} {len(kept) + 1} to 8: " in capsys.readouterr().out
    assert comparable(tmp_path)[len(kept) :] == comparable(whole_run)[8:]
    train(tiny.recipe(tiny_data, tmp_path))
    assert lost not in capsys.readouterr().out


def test_damaged_checkpoint_is_reported_and_the_one_before_taken(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, steps=8))
    (file,) = (tmp_path / "checkpoints" / "step_00000008").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train(tiny.recipe(tiny_data, tmp_path))
    output = capsys.readouterr().out
    assert "step_00000008" in output
    assert "damaged" in output
    assert "resumed at step 4" in output
    assert comparable(tmp_path) == comparable(whole_run)


def test_new_run_from_another_runs_state(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(tiny.recipe(tiny_data, first, steps=8))
    resume = CheckpointConfig(every=4, resume=str(first))
    train(tiny.recipe(tiny_data, second, checkpoint=resume))
    assert comparable(second) == comparable(whole_run)[8:]


def test_a_start_without_steps_names_the_checkpoint_that_it_has(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = CheckpointConfig(resume=str(whole_run))
    for run in (whole_run, tmp_path / "other"):  # both are at the end already
        capsys.readouterr()
        train(tiny.recipe(tiny_data, run, checkpoint=resume))
        told = capsys.readouterr().out
        assert f"checkpoint    {whole_run}/checkpoints/step_00000020" in told


def test_old_checkpoints_are_removed(whole_run: Path) -> None:
    names = sorted(path.name for path in (whole_run / "checkpoints").iterdir())
    assert names == ["step_00000012", "step_00000016", "step_00000020"]


def test_views_are_shown_in_tensorboard(whole_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole_run), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == [VIEWS]
    assert [event.step for event in events.Images(VIEWS)] == [1, 5, 10, 15, 20]
    (losses, records) = events.Scalars("train/loss"), lines(whole_run)
    assert [event.step for event in losses] == [record["step"] for record in records]


def test_baselines_stay_in_the_run_and_are_shown_after_a_resume(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are measured once, also when the first start ended before its first checkpoint."""
    probe = ProbeConfig(every=5, neighbours=5, baseline=True)
    config = tiny.recipe(tiny_data, tmp_path, probe=probe)
    tables = []
    for stop in (0, 5, 7):
        train(dataclasses.replace(config, steps=stop))
        tables.append(capsys.readouterr().out)
    first, *others = lines(tmp_path)
    assert [first["step"], *(record["step"] for record in others)] == list(range(8))
    assert first.keys() == {"step", "epoch", "knn_pixels", "knn_untrained", "knn_chance"}
    assert [text.count("kNN of raw pixels") for text in tables] == [1, 0, 0]
    assert "kNN accuracy on data.val" not in tables[0]
    for text in tables[1:]:
        assert f"raw pixels {first['knn_pixels']:14.1%}" in text
        assert f"untrained encoder  {first['knn_untrained']:6.1%}" in text
        assert f"trained encoder    {others[4]['knn_top1']:6.1%}" in text


@pytest.mark.parametrize(("every", "steps"), [(4, [1, 4, 8, 9]), (100, [1, 9])])
def test_the_first_and_the_last_step_are_logged(
    tiny_data: DataConfig, tmp_path: Path, every: int, steps: list[int]
) -> None:
    config = tiny.recipe(tiny_data, tmp_path, log=LogConfig(every=every), probe=tiny.NO_PROBE)
    train(dataclasses.replace(config, steps=9))
    assert [record["step"] for record in lines(tmp_path)] == steps


def test_data_digest_tells_audited_pixels_apart(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    audited = dataclasses.replace(tiny_data, audit=True)
    train(tiny.recipe(audited, tmp_path, steps=2))
    for ours, plain in zip(comparable(tmp_path), comparable(whole_run)[:2], strict=True):
        assert ours["loss"] == plain["loss"]
        assert ours["data_digest"] != plain["data_digest"]


def test_debug_step_leaves_nothing(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny.recipe(tiny_data, tmp_path, steps=2))
    before = contents(tmp_path)
    debug_step(open_trainer(tiny.recipe(tiny_data, tmp_path, debug_step=True)))
    assert contents(tmp_path) == before
    report = capsys.readouterr().out
    for part in ("load", "first step", "evaluate", "save", "restore", "memory"):
        assert part in report


def taken(run: Path) -> None:
    """Another job takes the run, as when this one had not answered for a while."""
    lease.acquire(str(run), [lease_of(run)["agents"][0]], lease.PERIOD, print).release()


def lease_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(max((run / "lease").glob("*.json")).read_text())
    return found


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_run_that_was_taken_is_left_alone(
    tiny_data: DataConfig, tmp_path: Path, log_every: int
) -> None:
    """Nothing is committed any more; where nothing is logged, the look before a commit finds it."""
    log = LogConfig(every=log_every)
    config = tiny.recipe(tiny_data, tmp_path, log=log, probe=ProbeConfig(), steps=8)
    with training(config) as trainer:
        train_step = trainer.train_step

        def step(batch: Batch) -> StepOutput:
            if trainer.step == 2:
                taken(tmp_path)
                assert trainer.run._held is not None
                if log_every == 1:
                    trainer.run._held._look()  # as at its next beat
            return train_step(batch)

        trainer.train_step = step  # type: ignore[method-assign]
        with pytest.raises(InputError, match="was taken over by another job"):
            finish(trainer)
    assert trainer.step == (3 if log_every == 1 else 8)
    assert not list((tmp_path / "checkpoints").glob("*/commit.json"))


def test_a_start_that_fails_lets_the_next_job_in(tiny_data: DataConfig, tmp_path: Path) -> None:
    resume = CheckpointConfig(resume=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="nothing: nothing there"):
        train(tiny.recipe(tiny_data, tmp_path / "run", checkpoint=resume))
    assert not (tmp_path / "run").exists()


def test_diverged_training_stops(tiny_data: DataConfig, tmp_path: Path) -> None:
    config = tiny.recipe(
        tiny_data, tmp_path, checkpoint=CheckpointConfig(every=0), probe=ProbeConfig()
    )
    trainer = open_trainer(dataclasses.replace(config, schedule=ScheduleConfig(epochs=10)))
    with torch.no_grad():
        next(trainer.online.parameters()).fill_(math.nan)
    with pytest.raises(InputError, match=r"diverged.* at step 2[01] \(loss nan, learning rate"):
        finish(trainer)
    assert not (tmp_path / "checkpoints").exists()
    assert lines(tmp_path)[-1]["loss"] is None


def test_diverged_state_is_not_saved(tiny_data: DataConfig, tmp_path: Path) -> None:
    """Also where no step is logged between two checkpoints."""
    config = tiny.recipe(
        tiny_data,
        tmp_path,
        schedule=ScheduleConfig(epochs=2, warmup="1 epoch", base_lr=1e30),
        log=LogConfig(every=1000),
        probe=ProbeConfig(),
        checkpoint=CheckpointConfig(every=1, keep=1),
    )
    with pytest.raises(InputError, match="diverged"):
        train(config)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == "step_00000001"  # at learning rate 0; the next step blows up


def poison_gradients(trainer: Trainer, first: int, last: int) -> None:
    """Make the gradients of the steps `first` to `last` not finite."""
    parameter = next(trainer.online.parameters())

    def poison(grad: torch.Tensor) -> torch.Tensor:
        return grad * math.nan if first <= trainer.step + 1 <= last else grad

    parameter.register_hook(poison)


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.parent.name[-8:]) for path in run.glob("checkpoints/*/commit.json"))


def test_skipped_steps_displace_no_checkpoint(tiny_data: DataConfig, tmp_path: Path) -> None:
    config = tiny.recipe(
        tiny_data,
        tmp_path,
        schedule=ScheduleConfig(epochs=10),
        probe=ProbeConfig(),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )
    with training(config) as trainer:
        poison_gradients(trainer, 7, 99)
        told = r"diverged.*; the checkpoint of step 6, saved before that, is kept: start a new run"
        with pytest.raises(InputError, match=told):
            finish(trainer)
    assert saved_steps(tmp_path) == [4, 6]


def test_good_steps_after_skipped_ones_are_saved(tiny_data: DataConfig, tmp_path: Path) -> None:
    """The last step of a process is saved in any case, but removes nothing where it was skipped."""
    config = tiny.recipe(
        tiny_data,
        tmp_path,
        steps=9,
        probe=ProbeConfig(),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )
    with training(config) as trainer:
        poison_gradients(trainer, 4, 4)
        poison_gradients(trainer, 9, 9)
        finish(trainer)
    assert saved_steps(tmp_path) == [6, 8, 9]


def test_message_of_diverged_training_without_checkpoint(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    config = tiny.recipe(
        tiny_data,
        tmp_path,
        schedule=ScheduleConfig(epochs=10),
        probe=ProbeConfig(),
        checkpoint=CheckpointConfig(every=1),
    )
    with training(config) as trainer:
        poison_gradients(trainer, 1, 99)
        with pytest.raises(InputError, match="; no checkpoint was saved before that: start"):
            finish(trainer)
    assert not saved_steps(tmp_path)


def test_epochs_of_the_recipe_are_steps_of_the_run(tiny_data: DataConfig, tmp_path: Path) -> None:
    """An epoch has 6 steps: 0.5 epochs are 3 of them, and 1/4 of an epoch ends at 2, 3, 5 and 6."""
    recipe = tiny.recipe(
        tiny_data,
        tmp_path,
        steps=13,
        log=LogConfig(every="1/4 epochs"),
        probe=ProbeConfig(every="0.5 epochs", neighbours=5),
        checkpoint=CheckpointConfig(every="0.5 epochs", keep=1, keep_every="1 epoch"),
    )
    train(recipe)
    logged = lines(tmp_path)
    # The first and the last step are always logged.
    assert [line["step"] for line in logged] == [1, 2, 3, 5, 6, 8, 9, 11, 12, 13]
    assert [line["step"] for line in logged if "knn_top1" in line] == [3, 6, 9, 12]
    saved = [commit.parent.name for commit in (tmp_path / "checkpoints").glob("*/commit.json")]
    assert sorted(saved) == ["step_00000006", "step_00000012", "step_00000013"]
    assert json.loads((tmp_path / "recipe.json").read_text())["probe.every"] == "0.5 epochs"


def test_a_warm_up_longer_than_the_run_is_refused(tiny_data: DataConfig, tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path, schedule=ScheduleConfig(epochs=2, warmup=14))
    with pytest.raises(InputError, match="warmup 14 is 14 steps, but the whole run has 13: give"):
        open_trainer(recipe)


def test_a_skipped_step_leaves_no_trace_but_its_count(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, precision="fp16"))
    trainer.step = 2
    with contextlib.closing(trainer.batches()) as batches:
        trainer.train_step(next(batches))
        before = copy.deepcopy(trainer.state())
        weight = trainer.online.get_parameter("projector.0.weight")
        hook = weight.register_hook(lambda grad: grad * math.inf)
        trainer.train_step(next(batches))
        hook.remove()
        after = copy.deepcopy(trainer.state())
        guards = before.pop("guard"), after.pop("guard")
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert guards[1]["scale"] == guards[0]["scale"] / 2
        assert guards[1]["skipped"] == guards[0]["skipped"] + 1
        kept = weight.detach().clone()
        trainer.train_step(next(batches))
        assert trainer.guard.skipped == guards[1]["skipped"]
        assert not torch.equal(weight, kept)
        assert trainer.step == 5  # all three count, also the one that was skipped


def test_labels_beyond_the_classes_are_refused(packed: Index, tmp_path: Path) -> None:
    fewer = Index(packed.url, packed.shards, packed.classes[:2])
    fewer.save()
    data = DataConfig(train=packed.url, streams=4)
    with pytest.raises(InputError, match="label 2, but the index has 2 classes"):
        train(tiny.recipe(data, tmp_path / "run", probe=ProbeConfig()))


def test_corrupt_images_are_named_once_for_the_whole_run(
    pack_files: PackFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{c}/{c}{i}.jpg": draw_photo(i, 40, 40) for c in "ab" for i in range(30)}
    files["a/a7.jpg"] = b"no image"
    url = pack_files(str(tmp_path / "data"), files).url
    data = DataConfig(train=url, val=url, streams=4)
    probe = ProbeConfig(every=2, neighbours=3)
    train(tiny.recipe(data, tmp_path / "run", probe=probe, steps=6))
    assert capsys.readouterr().out.count("a7: no JPEG, PNG or WebP image") == 1
