"""What `health` says of runs, by their logs: of real ones, which were saved, and of made ones."""

import io
import re
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engine.log import health, journal
from engine.log.health import ADVICE, HEALTHY, History, judge
from engine.log.metrics import MetricsLog
from engine.log.terminal import Terminal
from engine.log.watch import Watch
from engine.method.byol import BYOLConfig
from engine.method.torchvision_encoder import TorchvisionConfig
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.recipes import fields_of_all_recipes
from tests.helpers.training import train
from tests.whole.health_runs import CASES, find_alarm, judge_all, load

SAVED = load()
EARLY, LATE = 0.25, 0.5  # of the run
SOUND = [*(name for name, case in CASES.items() if case.wanted == HEALTHY), "too short"]
# Only evaluations, or many batches together, show that these fail, or they fail late.
SLOW = ["too short", "weight decay 1", "white views", "rate 0", "one image repeated"]


def record(step: int, **more: Any) -> dict[str, Any]:
    """A step of a healthy run."""
    figures = {"loss": 1.5, "feature_std": 0.5, "projection_std": 0.7, "view_correlation": 0.4}
    return {"step": step, **figures, "view_std": 0.8, "skipped": 0, "data_wait": 0.1, **more}


def statuses(records: list[dict[str, Any]], total_steps: int = 100) -> list[str]:
    return [found.status for _, found in judge_all(total_steps, records)]


@pytest.mark.parametrize("name", SAVED)
def test_saved_runs(name: str) -> None:
    wanted = CASES[name].wanted.split(" or ")
    status, progress, reason = find_alarm(judge_all(*SAVED[name]))
    assert status in wanted, reason
    if status != HEALTHY:
        assert progress <= (LATE if name in SLOW else EARLY)


@pytest.mark.parametrize("name", SOUND)
def test_sound_recipes_without_evaluations_are_healthy(name: str) -> None:
    total_steps, records = SAVED[name]
    plain = [{key: one[key] for key in one if key != "knn_top1"} for one in records]
    assert find_alarm(judge_all(total_steps, plain))[0] == HEALTHY


def test_enough_kinds_of_runs_are_saved() -> None:
    assert SAVED.keys() == CASES.keys()
    assert len(SOUND) >= 8
    assert len(SAVED) - len(SOUND) >= 8
    assert all("view_std" in records[-1] for _, records in SAVED.values())


@pytest.mark.parametrize(
    ("threshold", "wrong"),
    [
        *(("COLLAPSING", 0.8), ("COLLAPSING", 0.05), ("ALIKE", 0.5), ("FLAT", 0.7), ("GROWN", 0.5)),
        *(("GROWN", 1e9), ("TRIED", 2), ("STARVED", 0.001), ("RISEN", 0.3)),
    ],
)
def test_wrong_thresholds_are_found(
    threshold: str, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, threshold, wrong)
    found = {name: find_alarm(judge_all(*run))[0] for name, run in SAVED.items()}
    assert any(status not in CASES[name].wanted.split(" or ") for name, status in found.items())


def test_the_advice_names_fields_that_a_recipe_has() -> None:
    texts = " ".join(text for advice in ADVICE.values() for text in advice)
    named = set(re.findall(r"(?<!pack\.py )--([\w.-]*\w)", texts))
    assert {"schedule.base-lr", "schedule.warmup", "precision"} <= named
    assert named <= fields_of_all_recipes()


def test_diverging() -> None:
    assert statuses([record(n, loss=None) for n in (1, 2)]) == ["diverging"] * 2
    calm = [record(n) for n in range(10)]
    assert set(statuses(calm)) == {HEALTHY}
    rising = [record(n, loss=4.0 if n < 5 else 1.5) for n in range(20)]
    rising += [record(n, loss=3.5) for n in range(20, 26)]
    assert set(statuses(rising)[:21]) == {HEALTHY}
    assert statuses(rising)[-1] == "diverging"
    growing = [record(n, grad_norm=1.5 if n < 9 else 9.0) for n in range(1, 20)]
    assert statuses(growing) == [HEALTHY] * 10 + ["diverging"] * 9
    skips = [record(n, skipped=max(0, n - 10)) for n in range(1, 20)]
    assert statuses(skips)[9] == HEALTHY
    assert statuses(skips)[-1] == "diverging"


def test_starved_after_several_records_and_not_by_the_first() -> None:
    waits = [0.99, 0.1, 0.9, 0.1, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1]
    found = statuses([record(n, data_wait=wait) for n, wait in enumerate(waits, start=1)])
    assert found == [HEALTHY] * 4 + ["starved"] * 5 + [HEALTHY]


@pytest.mark.parametrize("chance", [0.125, 0.2, None])
def test_not_learning_when_knn_stays_below_the_untrained_encoders(chance: float | None) -> None:
    baseline = {"step": 0, "knn_untrained": 0.24, "knn_chance": chance}
    run = [record(n) for n in range(1, 100)]
    for n in (10, 40, 60, 80):
        run[n - 1]["knn_top1"] = 0.22 if n < 80 else 0.3
    found = statuses([baseline, *run])
    told = chance != 0.2  # the labels say nothing when the untrained encoder is at chance
    assert found[38] == HEALTHY
    assert found[39] == ("not learning" if told else HEALTHY)
    assert found[79] == HEALTHY
    assert set(statuses(run)) == {HEALTHY}  # without a baseline


def test_one_evaluation_is_enough_at_the_end_of_the_run() -> None:
    baseline = {"step": 0, "knn_untrained": 0.316, "knn_chance": 0.125}
    run = [record(n) for n in range(1, 32)]
    run[-1]["knn_top1"] = 0.256
    assert statuses([baseline, *run], 31) == [HEALTHY] * 30 + ["not learning"]
    reason = judge(History(31, [baseline, *run])).reason
    assert reason == "knn_top1 is 25.6% at step 31 of 31, and 31.6% without training"
    assert statuses([baseline, *run], 32) == [HEALTHY] * 31  # a second one will come
    run[-1]["knn_top1"] = 0.32
    assert statuses([baseline, *run], 31) == [HEALTHY] * 31


@pytest.mark.parametrize(
    ("images", "accuracy", "told"),
    [  # two standard errors of 0.25 are 0.0866 of 100 images, and 0.0087 of 10,000
        *((100, 0.165, False), (100, 0.162, True), (10_000, 0.242, False), (10_000, 0.240, True)),
        *((None, 0.25, True), (None, 0.251, False), (0, 0.24, True), ("x", 0.24, True)),
    ],
)
def test_knn_has_to_be_surely_below_the_untrained_encoder(
    images: Any, accuracy: float, told: bool
) -> None:
    """The number of images is unknown in logs of earlier releases, which are judged as before."""
    baseline = {"step": 0, "knn_untrained": 0.25, "knn_chance": 0.125}
    run = [record(n) for n in range(1, 61)]
    for n in (40, 60):
        run[n - 1] |= {"knn_top1": accuracy}
        if images is not None:
            run[n - 1]["knn_images"] = images
    assert statuses([baseline, *run])[-1] == ("not learning" if told else HEALTHY)
    lost = accuracy <= 0.25  # at its end a run has to be above, however little it lacks
    assert statuses([baseline, *run], 60)[-1] == ("not learning" if lost else HEALTHY)


def test_the_rate_is_named_where_it_is_the_likely_cause() -> None:
    run = [record(n, projection_std=0.1, lr=12.84) for n in range(1, 5)]
    found = judge(History(100, run))
    assert (found.status, found.reason[-12:]) == ("collapsed", "; lr is 12.8")
    assert found.describe(4).index("--schedule.base-lr") < found.describe(4).index("tau")


def test_records_of_other_versions_and_strangers_do_no_harm() -> None:
    old = [{"step": n, "loss": 4 - n / 50, "feature_std": 0.5, "skipped": 0} for n in range(1, 90)]
    assert set(statuses(old)) == {HEALTHY}
    odd = {"projection_std": "x", "view_std": True, "skipped": "\x1b[2J", "data_wait": None}
    assert set(statuses([record(n, **odd) for n in range(30)])) == {HEALTHY}
    assert judge(History(0)).status == HEALTHY


def test_a_step_that_is_logged_again_counts_once() -> None:
    waits = [0.9] * 4
    run = [record(n, data_wait=wait) for n, wait in enumerate(waits, start=1)]
    history = History(100, [*run, run[-1] | {"knn_top1": 0.5}])
    assert judge(history).status == HEALTHY
    assert [one["step"] for one in history.evaluated] == [4]


def test_the_log_keeps_health_and_tells_when_it_turns() -> None:
    """A second process continues where the first one was killed, and repeats what it was told."""
    run, output = f"memory://{secrets.token_hex(6)}/run", io.StringIO()
    spreads = [0.7] * 5 + [0.3] * 30 + [0.7] * 8
    lines = [record(n, projection_std=value) for n, value in enumerate(spreads, start=1)]
    for first, last in ((0, 15), (12, 43)):
        terminal = Terminal(main=True)
        terminal.console = Console(file=output, width=9999)
        log = MetricsLog(run, first, 43, terminal, total_steps=100)
        for line in lines[first:last]:
            log.write(line)
        log.stop()
        log.finish()
        assert log.health is not None
        assert log.health.status == statuses(lines[:last])[-1]
    found = [line["health"] for line in journal.read(run)]
    assert found == statuses(lines)
    assert found == [HEALTHY] * 6 + ["collapsing"] * 13 + ["collapsed"] * 20 + [HEALTHY] * 4
    told = [line for line in output.getvalue().splitlines() if line.startswith("health at")]
    assert [line.split(" (")[0] for line in told] == [
        "health at step 7: collapsing",
        "health at step 12: collapsing",
        "health at step 20: collapsed",
        "health at step 40: healthy again",
    ]
    assert ADVICE["collapsing"].change in told[0]
    log = MetricsLog(run, 43, 43, terminal)
    log.write({"step": 44, "knn_top1": 0.5})  # it has no figures of a step
    log.stop()
    assert "health" not in (log.last or {})


def watched(run: list[dict[str, Any]], total_steps: int = 600) -> tuple[list[str], list[str]]:
    """What is told of a run while it is logged, and at its end."""
    told: list[str] = []
    watch = Watch(total_steps, [], told.append)
    for one in run:
        watch.judge(one)
    return told, watch.summarize()


def test_a_run_at_the_threshold_does_not_turn_at_each_step() -> None:
    """It was healthy again at its very last step, with 0.466, and its summary was empty."""
    spreads = [0.7] * 10 + [0.05] * 20 + [0.44, 0.47] * 10 + [0.466] * 5
    run = [record(10 * n, projection_std=value) for n, value in enumerate(spreads, start=1)]
    assert "healthy again" not in str(watched(run)[0])
    told, (summary,) = watched(run)
    assert len(told) <= 3
    assert summary.startswith("collapsed (projection_std is 0.47 after the collapse, and not 0.5")
    better = [record(560 + n, projection_std=0.6) for n in range(1, 9)]
    found = statuses([*run, *better], 600)[-8:]
    assert found == ["collapsed"] * 4 + [HEALTHY] * 4
    told, (summary,) = watched([*run, *better])
    assert told[-1] == "health at step 565: healthy again"
    assert re.match(r"collaps\w+ at \d+ of 63 logged steps: .*; it is healthy now$", summary)


def test_a_trouble_of_a_few_steps_is_not_in_the_summary() -> None:
    spreads = [0.7] * 10 + [0.3] * 5 + [0.7] * 20
    run = [record(n, projection_std=value) for n, value in enumerate(spreads, start=1)]
    told, summary = watched(run)
    assert [line.split(" (")[0] for line in told] == [
        "health at step 12: collapsing",
        "health at step 20: healthy again",
    ]
    assert summary == []


def test_a_kind_of_trouble_is_explained_once() -> None:
    """And kNN does not take turns with a projection_std that goes up and down."""
    baseline = {"step": 0, "knn_untrained": 0.5, "knn_chance": 0.1, "knn_images": 1000}
    spreads = ([0.3] * 3 + [0.48] * 7) * 4 + [0.7] * 10 + [0.3] * 5
    run = [record(n, projection_std=value) for n, value in enumerate(spreads, start=1)]
    for n in range(5, len(run), 5):
        run[n]["knn_top1"] = 0.2
    told, _ = watched([baseline, *run], 60)
    kinds = [line.split(" (")[0].partition(": ")[2] for line in told]
    assert kinds == ["collapsing", "not learning", "collapsing again"]
    assert all(ADVICE[kind].change in line for kind, line in zip(kinds, told[:2], strict=False))
    assert told[2].endswith("less than 0.45)")


@pytest.mark.parametrize(
    ("momentum", "lags"), [(0.01, True), (0.1, False), (1.0, False), (0.2, False), (0.0, False)]
)
def test_running_statistics_that_lag_are_the_first_cause(momentum: float, lags: bool) -> None:
    baseline = {"step": 0, "knn_untrained": 0.3, "knn_chance": 0.1}
    run = [record(10 * n, knn_top1=0.1) for n in range(1, 101)]
    found = judge(History(300, [baseline, *run[:20]], momentum))
    assert found.status == "not learning"
    line = found.describe(200)
    cause = "likely causes: the running statistics, which evaluations use, are not those of "
    assert (cause in line) == lags
    assert ("have a momentum of 0.01 and need about 500 steps; too few steps" in line) == lags
    assert "running statistics" not in judge(History(1000, [baseline, *run], momentum)).describe(1)
    collapsed = [record(n, projection_std=0.1) for n in range(1, 9)]
    assert not judge(History(300, collapsed, momentum)).cause


def test_a_training_warns_of_running_statistics_that_lag(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = BYOLConfig(TorchvisionConfig("mobilenet_v3_small"), hidden=32, projection=16)
    for name, encoder, lags in (("slow", model, True), ("usual", None, False)):
        changes = {"model": encoder} if encoder else {}
        recipe = tiny.recipe(tiny_data, tmp_path / name, steps=1, **changes)
        assert train(recipe)
        told = "have a momentum of 0.01: kNN and other evaluations say nothing in the first 500"
        assert (told in capsys.readouterr().out) == lags


def test_a_training_repeats_its_trouble_at_its_end_and_at_the_next_start(
    tiny_data: DataConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path / "run", probe=tiny.NO_PROBE)
    assert train(replace(recipe, steps=4))
    assert "health" not in capsys.readouterr().out
    monkeypatch.setattr(health, "COLLAPSED", 9.0)
    assert train(replace(recipe, steps=8))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("health")]
    assert [line.split(" (")[0] for line in lines] == [
        "health at step 4: collapsed",
        "health        collapsed",
    ]
    assert lines[1].endswith(ADVICE["collapsed"].meaning)
