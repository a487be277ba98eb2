"""The command lines' options: scripts of users are written with them, and --help explains them."""

import json
from collections.abc import Callable, Iterator

import pytest

from engine.recipe import load
from launch import evaluate, export, pack, reports
from launch.benchmarks.accuracy import bench_accuracy
from launch.benchmarks.all import bench_all
from launch.benchmarks.checkpoint import bench_checkpoint
from launch.benchmarks.input import bench_input
from launch.benchmarks.order import bench_order
from launch.benchmarks.peers import bench_peers
from launch.benchmarks.plan import bench_plan
from launch.benchmarks.roofline import bench_roofline
from launch.benchmarks.step import bench_step
from launch.benchmarks.variants import bench_largest, bench_variants
from launch.feature_command import Features
from tests.helpers.command_help import field_texts, options, parameter_texts, squeeze
from tests.helpers.places import GOLDEN, ROOT

COMMANDS = json.loads((GOLDEN / "flags.json").read_text())  # of the first release
PROTOCOLS = {
    "linear": evaluate.Linear,
    "logistic": evaluate.Logistic,
    "knn": evaluate.KNN,
    "finetune": evaluate.Finetune,
    "semi-supervised": evaluate.SemiSupervised,
    "neighbours": evaluate.Neighbours,
    "features": Features,
    "report": reports.Report,
    "runs": reports.Runs,
}
BENCHES: dict[str, Callable[..., object]] = {
    "accuracy": bench_accuracy,
    "all": bench_all,
    "input": bench_input,
    "step": bench_step,
    "checkpoint": bench_checkpoint,
    "order": bench_order,
    "peers": bench_peers,
    "plan": bench_plan,
    "roofline": bench_roofline,
    "variants": bench_variants,
    "largest": bench_largest,
}


def texts(command: str) -> Iterator[tuple[str, str]]:
    """Every option, and what the source says of it."""
    script, *rest = command.split()
    match script.removeprefix("launch/"):
        case "train.py":
            return field_texts(load(str(ROOT / rest[0])))
        case "evaluate.py":
            return field_texts(PROTOCOLS[rest[0]])
        case "export.py":
            return field_texts(export.Export)
        case "pack.py":
            return parameter_texts(pack.main)
    return parameter_texts(BENCHES[rest[0]])


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_lost_or_renamed(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(options(command, monkeypatch, capsys)) == COMMANDS[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_has_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text of its own, below its name."""
    shown, expected = options(command, monkeypatch, capsys), dict(texts(command))
    positive = {name for name in shown if not name.rpartition(".")[2].strip("-").startswith("no-")}
    assert expected.keys() == positive - {"--help", "--run-url"}
    for name, text in expected.items():
        assert text, f"{name} has no docstring"
        assert squeeze(text) in shown[name], name
