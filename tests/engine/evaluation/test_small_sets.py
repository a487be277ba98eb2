"""Evaluations that learn from few images: the batch, what is told meanwhile, and the hints."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.evaluation import supervised
from engine.evaluation.finetune import FinetuneConfig
from engine.evaluation.linear import LinearConfig, LinearTraining
from engine.evaluation.supervised import (
    FEW,
    check_held_out,
    count_epoch,
    fit_batch,
    hint_at_edge,
)
from engine.processes.world import World
from launch import evaluate
from shards.errors import InputError
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.training import train


@pytest.fixture(scope="module")
def run(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("small") / "run")
    assert train(tiny.recipe(tiny_data, url, steps=2, probe=tiny.NO_PROBE))
    return url


def stand_in(processes: int, told: list[str]) -> Any:
    """What of an evaluation is used here."""
    return SimpleNamespace(
        world=World(0, processes, processes, torch.device("cpu")),
        settings={"batch": 1024},
        terminal=SimpleNamespace(say=told.append),
    )


@pytest.mark.parametrize(
    ("images", "processes", "batch"),
    [
        *((104, 1, 104), (101, 1, 101), (1023, 1, 1023), (1024, 1, 1024), (5000, 1, 1024)),
        *((101, 2, 100), (101, 3, 100), (1000, 8, 1000), (1023, 64, 960), (3, 2, 1024)),
    ],
)
def test_the_default_batch_fits(images: int, processes: int, batch: int) -> None:
    """It can be shared out, and the folder of a large set's results stays where it was."""
    evaluation = stand_in(processes, [])
    index: Any = SimpleNamespace(samples=images)
    assert LinearConfig().settings()["batch"] == FinetuneConfig().settings()["batch"] == 1024
    assert fit_batch(LinearConfig(), index, evaluation).batch == batch
    assert evaluation.settings == {"batch": batch}
    if batch <= images:
        assert math.gcd(batch, supervised.STREAMS) >= processes
    assert fit_batch(LinearConfig(batch=512), index, evaluation).batch == 512


@pytest.mark.parametrize("protocol", [["linear"], ["linear", "--fast"], ["finetune"]])
def test_no_batch_need_be_given(
    protocol: list[str], run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--lr", "0.1", "--epochs", "2", "--threads", "1", "--out", str(tmp_path)]
    name, *options = protocol
    assert evaluate.main([name, run, *options, *few]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{name}: opening {run}"
    assert "batch 104: data.train has 104 images" in told
    (found,) = tmp_path.glob("**/result.json")
    assert json.loads(found.read_text())["settings"]["batch"] == 104
    assert evaluate.main([name, run, *options, *few]) == 0
    assert "measured before" in capsys.readouterr().out


def test_what_is_in_hand_is_named() -> None:
    """The rates and the epoch of the next step."""
    here = World(0, 1, 1, torch.device("cpu"))
    training = LinearTraining(LinearConfig(epochs=80), 4, 2, 800, here)
    assert training.in_hand() == "lr 0.05 to 0.4, epoch 1 of 80"
    training.step = 119
    assert training.in_hand() == "lr 0.05 to 0.4, epoch 12 of 80"
    training = LinearTraining(LinearConfig(epochs=2, lr=(0.3,)), 4, 2, 800, here)
    training.step = 799
    assert training.in_hand() == "lr 0.3, epoch 2 of 2"
    assert count_epoch(0, 3, 0.5) == "epoch 1 of 0.5"


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ([0.1, 0.2, 0.3], "the best --lr is the lowest that was tried, 0.1: try lower ones too"),
        ([0.3, 0.2, 0.1], "the best --lr is the highest that was tried, 0.4: try higher ones too"),
        ([0.1, 0.3, 0.2], ""),
        (
            [0.3, 0.3, 0.2],
            "the highest --lr that was tried, 0.4, shared the best score with others: try higher "
            "ones too",
        ),
        (
            [0.3, 0.1, 0.3],
            "the highest and the lowest --lr that were tried, 0.4 and 0.1, shared the best score: "
            "try higher and lower ones too",
        ),
    ],
)
def test_a_rate_at_the_edge_is_told(scores: list[float], text: str) -> None:
    told: list[str] = []
    hint_at_edge((0.4, 0.2, 0.1), scores, stand_in(1, told))
    assert told == ([text] if text else [])
    hint_at_edge((0.4,), scores[:1], stand_in(1, told))
    assert told == ([text] if text else [])


def test_fine_tuning_of_several_lengths_is_told() -> None:
    """The edge is one of rates, whatever the lengths are."""
    told: list[str] = []
    hint_at_edge((0.4, 0.4, 0.2, 0.1), [0.5, 0.2, 0.6, 0.5], stand_in(1, told))
    assert told == []
    hint_at_edge((0.4, 0.4, 0.1, 0.1), [0.5, 0.5, 0.1, 0.2], stand_in(1, told))
    assert told == ["the best --lr is the highest that was tried, 0.4: try higher ones too"]


def test_a_choice_on_few_images_is_told() -> None:
    told: list[str] = []
    for count, choices in ((FEW, 3), (FEW - 1, 1), (3, 2)):
        check_held_out(count, choices, told.append)
    (line,) = told
    assert line.startswith("3 held-out images choose the learning rate")
    with pytest.raises(InputError, match="is held out to choose"):
        check_held_out(0, 2, told.append)
