"""What tensorboard shows of a folder of runs: their names, groups of curves, and recipes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from engine.evaluation.during_training import ProbeConfig
from engine.log.curves import name_curve, show_fields
from engine.log.metrics import BASELINES, TIMINGS
from engine.state.checkpoint import CheckpointConfig
from launch import evaluate
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.training import train


@pytest.fixture(scope="module")
def shown(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of two runs, of which one was evaluated on its own data and on others."""
    runs = tmp_path_factory.mktemp("runs")
    probe = ProbeConfig(every=2, neighbours=5, baseline=True)
    for name, seed in (("mine", 0), ("other", 1)):
        train(tiny.recipe(tiny_data, runs / name, seed=seed, steps=2, probe=probe))
    knn = ["knn", str(runs / "mine"), "--k", "5", "--threads", "1"]
    assert evaluate.main(knn) == evaluate.main([*knn, "--data.val", tiny_data.train]) == 0
    return EventMultiplexer().AddRunsFromDirectory(str(runs)).Reload()


def tags(shown: Any, run: str) -> list[str]:
    found: list[str] = sorted(shown.Runs()[run]["tensors"])
    return [tag for tag in found if "/" in tag and not tag.startswith("_")]


def test_runs_have_the_names_of_their_folders(shown: Any) -> None:
    mine, other, own, apart = sorted(shown.Runs(), key=lambda name: (name.count("/"), name))
    assert (mine, other, own) == ("mine", "other", "mine/evaluations")
    assert apart.startswith("mine/evaluations/on_")
    assert tags(shown, own) == ["eval/knn_k5_t0.07_top1"]
    assert len(tags(shown, apart)) == 1


def test_the_loss_and_knn_come_first_in_their_groups(shown: Any) -> None:
    groups: dict[str, list[str]] = {}
    for tag in tags(shown, "mine"):
        groups.setdefault(tag.split("/")[0], []).append(tag)
    assert groups.keys() == {"train", "views", "eval", "schedule", "system"}
    assert groups["train"][0] == "train/loss"
    assert groups["eval"][0] == "eval/knn_top1"
    keys = ("knn_pixels", "knn_untrained")
    baselines = [shown.Tensors("mine", name_curve(key)) for key in keys]
    assert [[event.step for event in line] for line in baselines] == [[0, 2]] * 2  # lines


def test_keys_can_be_found_among_the_curves() -> None:
    for key in ("loss", "grad_norm", "feature_std", "feature_rank", *TIMINGS, *BASELINES):
        assert name_curve(key).endswith(key)
    assert name_curve("some\nkey") == "train/some\\nkey"


def test_the_recipe_is_shown_and_compared(shown: Any) -> None:
    compared = []
    for run in ("mine", "other"):
        (text,) = shown.Tensors(run, "recipe")
        assert "| schedule.base\\_lr | 2.0 |" in text.tensor_proto.string_val[0].decode()
        metadata = shown.SummaryMetadata(run, "_hparams_/session_start_info")
        data = HParamsPluginData.FromString(metadata.plugin_data.content)
        compared.append(data.session_start_info.hparams)
    assert [fields["seed"].number_value for fields in compared] == [0, 1]
    assert compared[0]["optimizer"].string_value == "LARSConfig"
    assert "steps" not in compared[0]  # may change at every start


def test_the_overview_begins_with_the_loss_and_knn(shown: Any) -> None:
    (event,) = shown.Tensors("mine", "custom_scalars__config__")
    (overview,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    assert [chart.multiline.tag[0] for chart in overview.chart[:2]] == [
        "^train/loss$",
        "^eval/knn_top1$",
    ]


def test_secrets_and_markup_are_not_shown(tiny_data: DataConfig, tmp_path: Path) -> None:
    text = show_fields({"run": "a|b\n<script>"}).tensor.string_val[0].decode()
    assert text.splitlines()[2:] == [r"| run | a\|b\\n\<script\> |"]
    resume = CheckpointConfig(resume="https://name:sesame@host/run?signature=sesame")
    config = tiny.recipe(tiny_data, tmp_path / "run", steps=1, probe=tiny.NO_PROBE)
    train(config)
    train(dataclasses.replace(config, steps=2, checkpoint=resume))
    for path in (tmp_path / "run").glob("events*"):
        assert b"sesame" not in path.read_bytes()


def test_a_run_of_an_earlier_release_gets_all_its_curves(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    """Its files in RUN/tensorboard stay as they are."""
    config = tiny.recipe(tiny_data, tmp_path / "old", steps=3, probe=tiny.NO_PROBE)
    train(config)
    folder = tmp_path / "old" / "tensorboard"
    folder.mkdir()
    for path in (tmp_path / "old").glob("events*"):
        path.rename(folder / path.name)
    train(dataclasses.replace(config, steps=5))
    shown = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    steps = [event.step for event in shown.Tensors("old", "train/loss")]
    assert steps == [1, 2, 3, 4, 5]
    assert len(list(folder.iterdir())) == 1
