"""Runs shown in Weights & Biases, in its offline mode: what it would send is read back."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.log import journal, sending
from engine.log.curves import name_curve
from engine.log.metrics import NOT_PLOTTED, LogConfig
from engine.log.tracker_ids import TRACKERS
from engine.log.trackers import Description, Point
from engine.log.tracking import check_trackers
from engine.log.wandb_tracker import WandbTracker
from shards.errors import InputError
from tests.helpers import tiny
from tests.helpers.training import train
from tests.helpers.wandb_files import find_runs, read_history, read_records

wandb = pytest.importorskip("wandb", reason="wandb is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    monkeypatch.setattr(sending, "UNSENT", 60.0)  # this machine may be loaded
    (tmp_path / "wandb").mkdir()
    return tmp_path / "wandb"


def fail(*_: object) -> None:
    raise InputError("the data is at fault")


def test_a_run_and_its_continuation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--run", "s3://me:SECRET@bucket"])
    monkeypatch.setenv("WANDB_API_KEY", "SECRET" * 7)
    data, run = tiny.draw_data(tmp_path / "data"), tmp_path / "run"
    recipe = tiny.recipe(data, run, steps=6, log=LogConfig(every=1, wandb="team/byol"))
    train(recipe)
    train(replace(recipe, steps=8))
    monkeypatch.setattr("engine.fit.check_skips", fail)
    with pytest.raises(InputError):
        train(replace(recipe, steps=9))

    records = [read_records(path) for path in find_runs(folder)]
    begun = [next(one.run for one in found if one.HasField("run")) for found in records]
    assert [(one.entity, one.project, one.display_name) for one in begun] == [
        ("team", "byol", "run")
    ] * 3
    ends = [next(one.exit for one in found if one.HasField("exit")) for found in records]
    assert [one.exit_code for one in ends] == [0, 0, 1]  # W&B calls the last one failed
    assert begun[0].run_id == begun[1].run_id == json.loads((run / TRACKERS).read_text())["id"]
    config = {item.key: item.value_json for item in begun[0].config.update}
    assert config["schedule.base_lr"] == "2.0"

    # An offline file has all steps, so that the newest one is enough.
    history = read_history(records[1])
    for record in journal.read(str(run)):
        shown = [one for one in history if one["_step"] == record["step"]]
        assert len(shown) == 1
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        for key in NOT_PLOTTED & numbers.keys():
            del numbers[key]
        assert {key: shown[0][name_curve(key)] for key in numbers} == numbers
    name = "views/batch/caption"
    captions = [one[name] for one in read_history(records[0]) if name in one]
    assert captions[-1] == "step 5"
    for path in (*folder.rglob("*"), run / TRACKERS):
        assert not path.is_file() or b"SECRET" not in path.read_bytes()


def test_a_run_that_wandb_has_already(folder: Path) -> None:  # noqa: ARG001
    """Steps that W&B has are left out, and a figure that comes late gets the next step."""
    tracker = WandbTracker("byol", Description("run", "1a2b3c4d", {}, 4))
    shown: list[tuple[int, dict[str, float]]] = []

    class Stub:
        starting_step, offline, url = 6, False, "http://wandb/run"

        def log(self, values: dict[str, float], step: int) -> None:
            shown.append((step, values))

    tracker._open = Stub  # type: ignore[method-assign]
    assert tracker.start([Point({"train/loss": 1.0}, step) for step in range(5)]) == Stub.url
    tracker.scalars([Point({"eval/knn_top1": 0.5}, 4)])  # an evaluation that is made up for
    tracker.scalars([Point({"train/loss": 1.0}, step) for step in (5, 6, 7)])
    assert shown == [
        (6, {"eval/knn_top1": 0.5}),
        (6, {"train/loss": 1.0}),
        (7, {"train/loss": 1.0}),
    ]


def test_without_a_key_it_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()
    with pytest.raises(InputError, match=r"^log.wandb: W&B has no API key: run `wandb login`"):
        check_trackers("", "byol")
    wandb.teardown()
