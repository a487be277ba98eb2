"""A training that ends when a figure no longer improves: where, how it is told, how it goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.data import open_data, open_own_probe_sets
from engine.evaluation.during_training import Probe, ProbeConfig, Stopped
from engine.explain.report import explain
from engine.log.journal import STOPPED_EARLY
from engine.log.metrics import TIMINGS, LogConfig, NoLog
from engine.log.terminal import Terminal
from engine.method.durations import is_due
from engine.method.schedule import ScheduleConfig
from engine.processes.world import World
from engine.recipe import Recipe
from engine.report.survey import survey_runs
from engine.state import checkpoint
from engine.state.checkpoint import CheckpointConfig
from engine.state.early_stop import EarlyStop, EarlyStopConfig, Patience, find_doubt
from engine.trainer import Trainer
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, train, training

VALUES = {2: 0.2, 4: 0.6, 6: 0.5, 8: 0.6, 10: 0.7, 12: 0.1, 14: 0.9}  # of knn_top1, by step
NAN, INFINITY = float("nan"), float("inf")
STOP = EarlyStopConfig("knn_top1", patience=2)  # after step 8
REASON = "knn_top1 60.0% of step 4 was followed by 2 measurements without a better one"
ALONE = World(0, 1, 1, torch.device("cpu"))


def recipe(data: DataConfig, run: Path | str, stop: EarlyStopConfig, **changes: Any) -> Recipe:
    given = {
        "probe": ProbeConfig(every=2, neighbours=5),
        "checkpoint": CheckpointConfig(every=5),
        "early_stop": stop,
        "steps": 14,
    }
    return tiny.recipe(data, run, **given | changes)


def train_with(config: Recipe, interrupted: int = 0) -> int:
    """Train with evaluations that find VALUES, and return the step that is reached.

    The evaluation of the step `interrupted` is left, as after a signal.
    """

    def evaluate(trainer: Trainer) -> dict[str, Any]:
        if trainer.step == interrupted:
            raise Stopped
        return {"knn_top1": VALUES[trainer.step], "feature_rank": 2.0}

    with pytest.MonkeyPatch.context() as patch, training(config) as trainer:
        patch.setattr(Probe, "evaluate", lambda *_: evaluate(trainer))
        finish(trainer)
        return trainer.step


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def comparable(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines(run)]


def state_of(run: Path | str) -> str:
    return survey_runs(str(run), 0).runs[0].state


@pytest.mark.parametrize(
    ("config", "values", "ends"),
    [
        (EarlyStopConfig("knn_top1", 2), [0.1, 0.2, 0.2, 0.1, 0.9], 4),
        (EarlyStopConfig("knn_top1", 2), [0.1, 0.2, 0.1, 0.3, 0.2], None),
        (EarlyStopConfig("knn_top1", 1), [None, "high", NAN, 0.5, INFINITY, 0.6], None),
        (EarlyStopConfig("knn_top1", 2, least=0.1), [0.1, 0.15, 0.21, 0.25, 0.3], 5),
        (EarlyStopConfig("knn_top1", 1, least=0.01), [0.2, 0.21, 0.22, 0.23, 0.23], 5),
        (EarlyStopConfig("loss", 2), [3, 2, 2.5, 2, 1], 4),
        (EarlyStopConfig("loss", 2), [3.0, 2.0, 2.5, 1.9, 1.8], None),
        (EarlyStopConfig("loss", 3, least=0.5), [3.0, 2.6, 2.4, 2.2, 2.1, 2.0], 6),
        (EarlyStopConfig("head_loss", 1), [1.0, 1.1], 2),
        (EarlyStopConfig("view_correlation", 1), [0.1, 0.2, 0.1], 3),
    ],
)
def test_made_records(config: EarlyStopConfig, values: list[Any], ends: int | None) -> None:
    patience, found = Patience(config), None
    for step, value in enumerate(values, start=1):
        patience.note({"step": step, config.key: value})
        if found is None and patience.reason:
            found = step
    assert found == ends


def test_a_run_ends_early(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(tiny_data, tmp_path, STOP)
    assert train_with(config) == 8
    told = " ".join(capsys.readouterr().out.split())
    assert f"stopped early: {REASON}" in told
    assert "goes on with a larger --early-stop.patience than 2, or" in told
    assert checkpoint.committed_steps(str(tmp_path))[-1] == 8
    assert [line.get(STOPPED_EARLY) for line in lines(tmp_path)] == [None] * 7 + [REASON]
    assert state_of(tmp_path) == "stopped early"
    assert f"stopped early: {REASON}" in (tmp_path / "report.html").read_text()

    assert train_with(config) == 8  # the same command
    assert f"stopped early: {REASON}" in " ".join(capsys.readouterr().out.split())
    assert train_with(dataclasses.replace(config, early_stop=EarlyStopConfig(), steps=9)) == 9
    assert "stopped early" not in capsys.readouterr().out
    assert state_of(tmp_path) == "stopped"
    patient = dataclasses.replace(STOP, patience=3)
    assert train_with(dataclasses.replace(config, early_stop=patient, steps=10)) == 10


def test_in_object_storage(tiny_data: DataConfig, s3: str) -> None:
    run = files.join(s3, "run")
    for last in (5, 14):
        train_with(recipe(tiny_data, run, STOP, steps=last))
    records = [json.loads(line) for line in files.read(f"{run}/metrics.jsonl").splitlines()]
    assert (records[-1]["step"], records[-1][STOPPED_EARLY]) == (8, REASON)
    assert state_of(run) == "stopped early"


@pytest.mark.parametrize("stops", [[3], [6, 7]])
def test_a_resumed_run_ends_at_the_same_step(
    tiny_data: DataConfig, tmp_path: Path, stops: list[int]
) -> None:
    assert train_with(recipe(tiny_data, tmp_path / "whole", STOP)) == 8
    for stop in stops:
        train_with(recipe(tiny_data, tmp_path / "parts", STOP, steps=stop))
    assert train_with(recipe(tiny_data, tmp_path / "parts", STOP)) == 8
    assert comparable(tmp_path / "parts") == comparable(tmp_path / "whole")


def test_an_evaluation_that_was_left_counts_when_it_is_made(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    config = recipe(tiny_data, tmp_path, STOP)
    assert train_with(config, interrupted=8) == 8
    assert STOPPED_EARLY not in lines(tmp_path)[-1]
    assert train_with(config) == 8
    assert STOPPED_EARLY in lines(tmp_path)[-1]


def test_a_figure_of_the_steps(tiny_data: DataConfig, tmp_path: Path) -> None:
    """Beside the log of a whole run."""
    schedule = ScheduleConfig(epochs=20 * 16 / tiny.SAMPLES, warmup=0, base_lr=2.0)
    given = {"log": LogConfig(every=3), "probe": tiny.NO_PROBE, "steps": 18, "schedule": schedule}
    train(recipe(tiny_data, tmp_path / "whole", EarlyStopConfig(), **given))
    whole = comparable(tmp_path / "whole")
    assert [line["step"] for line in whole] == [1, 3, 6, 9, 12, 15, 18]
    ends = {}
    for key in ("loss", "grad_norm", "feature_std", "view_correlation"):
        sign = -1 if key in ("loss", "grad_norm") else 1
        values = [sign * line[key] for line in whole]
        worse = [n for n in range(1, len(values)) if values[n] <= max(values[:n])]
        ends[key] = worse[0] if worse else len(values)
    key = min(ends, key=lambda key: ends[key])
    for name, stops in (("early", [18]), ("parts", [2, 18])):
        for last in stops:
            stop = EarlyStopConfig(key, patience=1)
            train(recipe(tiny_data, tmp_path / name, stop, **given | {"steps": last}))
        found = [line for line in comparable(tmp_path / name) if line["step"] != 2]
        assert found[-1].pop(STOPPED_EARLY).startswith(f"{key} ")
        assert found == whole[: ends[key] + 1]


class MadeLog(NoLog):
    """Records that earlier processes logged."""

    def __init__(self, values: dict[int, float]) -> None:
        self._records = [{"step": n, "loss": v, "knn_top1": -v} for n, v in values.items()]

    @property
    def records(self) -> list[dict[str, Any]]:
        return self._records

    def mark(self, values: dict[str, Any]) -> None:
        self._records[-1] |= values


@pytest.mark.parametrize(("key", "counts"), [("loss", False), ("knn_top1", True)])
def test_lines_of_processes_that_ended_do_not_count(key: str, counts: bool) -> None:
    """The last step of a process is logged wherever it is, but evaluated only when that is due."""
    values = {1: 4.0, 3: 3.0, 4: 3.5, 6: 2.0}
    log = MadeLog(values)
    config = EarlyStopConfig(key, patience=1)
    early = EarlyStop(config, ALONE, log, 0, 20, lambda step: step in (1, 3, 6))
    early.note({"step": 7, "loss": 2.5, "knn_top1": -2.5})
    assert bool(early.reason) is counts
    early.note({"step": 9, "loss": 1.0})
    assert early.limit(9, 20) == (9 if counts else 20)


def test_the_last_step_of_the_run_ends_nothing_early() -> None:
    config = EarlyStopConfig("loss", patience=1)
    for total, ends in ((7, True), (6, False)):
        for values in ({1: 1.0, 3: 0.5, 6: 0.7}, {1: 0.5, 3: 0.6, 6: 0.7}):
            log = MadeLog(values)
            early = EarlyStop(config, ALONE, log, 0, total, lambda _: True)
            assert bool(early.reason) is (STOPPED_EARLY in log.records[-1]) is ends


@pytest.mark.parametrize(("warmup", "ends"), [(0, 2), (2, 4), (3, 5), (9, None)])
def test_measurements_within_the_warmup_do_not_count(warmup: int, ends: int | None) -> None:
    """They are neither the best nor worse than it, and are left out of an older log too."""
    values = {step: float(step) for step in range(1, 7)}  # a loss that rises
    config, found = EarlyStopConfig("loss", patience=1), None
    for step in values:
        log = MadeLog({s: v for s, v in values.items() if s <= step})
        resumed = EarlyStop(config, ALONE, log, warmup, 20, lambda _: True)
        if found is None and resumed.reason:
            found = step
    assert found == ends
    log = MadeLog({0: 0.0})
    early = EarlyStop(config, ALONE, log, warmup, 20, lambda _: True)
    steps = []
    for step, value in values.items():
        early.note({"step": step, "loss": value})
        steps += [step] * bool(early.reason)
    assert steps[:1] == ([] if ends is None else [ends])


def test_a_run_that_ended_below_its_untrained_encoder_says_so(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And names the step of a measurement that is not of the last step."""
    stop = EarlyStopConfig("grad_norm", patience=1, least=1e9)  # after the second one that counts
    baseline = {"knn_pixels": 0.4, "knn_untrained": 0.9, "knn_chance": 0.1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "measure_baseline", lambda *_: baseline)
        probed = recipe(tiny_data, tmp_path, stop)
        probe = dataclasses.replace(probed.probe, baseline=True)
        train_with(dataclasses.replace(probed, probe=probe))
    told = " ".join(capsys.readouterr().out.split())
    assert STOPPED_EARLY in lines(tmp_path)[-1]
    assert lines(tmp_path)[-1]["health"] == "not learning"
    assert "health not learning (knn_top1 is 60.0% at step 4 of 20, and 90.0% without" in told
    assert "the trained encoder was measured last at step 4" in told


@pytest.mark.parametrize("warmup", [0, 1, 7, 18, 19, 20])
@pytest.mark.parametrize("patience", [1, 4, 17])
@pytest.mark.parametrize("every", [(1, 2), (3, 6), (5, 5), ("7/2 steps", 0), ("1/2 steps", 4)])
def test_a_stop_that_can_never_come_is_told(
    warmup: int, patience: int, every: tuple[int | str, int | str]
) -> None:
    """As often as counting the steps one by one finds it."""
    for key, measured in (("loss", every), ("knn_top1", every[1:])):
        steps = {
            step
            for step in range(warmup + 1, 20)
            if (step == 1 and key == "loss") or any(is_due(one, step) for one in measured)
        }
        doubt = find_doubt(EarlyStopConfig(key, patience), warmup, 20, *every)
        assert bool(doubt) == (len(steps) <= patience), (key, steps)
        assert not doubt or f"it is measured {len(steps)} time" in doubt
    assert not find_doubt(EarlyStopConfig(patience=patience), warmup, 20, *every)


def test_a_start_tells_that_its_stop_never_comes(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(tiny_data, tmp_path, STOP, steps=0)
    assert train(config)
    assert "cannot end this run" not in capsys.readouterr().out
    long = dataclasses.replace(config.schedule, warmup="20 steps")
    config = dataclasses.replace(config, schedule=long, run=f"{tmp_path}/long")
    line = (
        "early_stop.key knn_top1 cannot end this run: it is measured 0 times between the 20 steps "
        "of the warm-up and the last step, 20, and early_stop.patience 2 needs 3: give a shorter "
        "--schedule.warmup\n"
    )
    assert train(config)
    assert line in capsys.readouterr().out
    explain(config, ALONE, Terminal(main=True))
    assert line in capsys.readouterr().out


def test_processes_end_together(ranks: Ranks, tiny_data: DataConfig, tmp_path: Path) -> None:
    config = recipe(tiny_data, tmp_path, STOP)
    config = dataclasses.replace(config, steps=5)
    assert ranks.run(train_with, config, size=2) == [5, 5]
    for _ in range(2):  # the second time, it has ended before
        assert ranks.run(train_with, dataclasses.replace(config, steps=14), size=2) == [8, 8]
    assert state_of(tmp_path) == "stopped early"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("knn_top", r"early_stop.key 'knn_top': .*did you mean knn_top1\? The figures are "),
        ("Loss", r"did you mean loss\?"),
        ("images_per_second", "can get better: give one of knn_top1, "),
        ("linear_top1", "is no figure that the training measures"),
        ("update_ratio", "is no figure that the training measures and that can get better"),
        ("\x1b[31m", r"early_stop.key '\\x1b\[31m'"),
    ],
)
def test_a_wrong_key_is_refused(tiny_data: DataConfig, key: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        recipe(tiny_data, "run", EarlyStopConfig(key)).check()


def test_a_figure_that_is_not_measured_is_refused(tiny_data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"early_stop.key knn_top1 is measured at evaluations"):
        recipe(tiny_data, "run", STOP, probe=tiny.NO_PROBE).check()
    recipe(tiny_data, "run", EarlyStopConfig("loss"), probe=tiny.NO_PROBE).check()
    alone = DataConfig(train=tiny_data.train, streams=4)
    with pytest.raises(InputError, match=r"early_stop.key knn_top1 cannot be measured on data.val"):
        train(recipe(alone, tmp_path / "run", STOP))
    config = recipe(tiny_data, tmp_path / "run", EarlyStopConfig("head_loss"))
    data = open_data(config, ALONE, print)
    data = data._replace(train=dataclasses.replace(data.train, classes=[]))
    with pytest.raises(InputError, match=r"head_loss cannot be measured, because data.train has"):
        open_own_probe_sets(config, data, ALONE, 1, print)
    for wrong in (EarlyStopConfig(patience=0), EarlyStopConfig(least=-1)):
        with pytest.raises(InputError, match=r"early_stop\.(patience|least) must be"):
            recipe(tiny_data, "run", wrong).check()
