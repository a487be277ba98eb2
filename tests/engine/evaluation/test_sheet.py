"""The sheet of neighbors that a training draws at its end: right, cheap, and never in its way."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.evaluation import during_training, sheet
from engine.evaluation.features import Features
from engine.evaluation.knn import Neighbours
from engine.evaluation.sheet import BORDER, COLUMNS, RIGHT, ROWS, SMALL, WRONG, choose_examples
from engine.processes.world import join
from engine.report.report import write_report
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, train, training
from tests.helpers.web_pages import read_page

CELL = SMALL + 4 * BORDER


def test_a_training_ends_with_a_sheet_of_its_newest_evaluation(
    tiny_data: DataConfig, store: str
) -> None:
    run = files.join(store, "run")
    with training(tiny.recipe(tiny_data, run, steps=7)) as trainer:
        assert finish(trainer)
        assert trainer.probe is not None
        bank, queries = map(trainer.probe.extract, (trainer.probe.train, trainer.probe.val))
        examples = trainer.probe._examples
    # The newest evaluation was at step 5, and the sheet says so.
    assert files.list_names(files.join(run, "neighbours")) == ["step_00000005.png"]
    content = files.read(files.join(run, "neighbours", "step_00000005.png"))
    pixels = np.array(Image.open(io.BytesIO(content)))
    assert pixels.shape == (ROWS * CELL, 6 * CELL, 3)  # kNN has 5 neighbors here
    assert [one.id for one in examples] == [0, 5, 10, 15, 20, 25, 30, 35]  # of 40 images
    labels = dict(zip(bank.ids.tolist(), bank.labels.tolist(), strict=True))
    own = dict(zip(queries.ids.tolist(), queries.labels.tolist(), strict=True))
    for row, one in enumerate(examples):
        assert one.label == own[one.id]
        assert one.near_labels == [labels[n] for n in one.near]
        for column, n in enumerate(one.near, start=1):
            border = pixels[row * CELL + BORDER, column * CELL + BORDER]
            assert tuple(border) == (RIGHT if labels[n] == one.label else WRONG)
    text = read_page(files.read(files.join(run, "report.html"))).text
    assert "It is neighbours/step_00000005.png of the run" in text


def test_the_neighbors_are_those_of_the_evaluation(tiny_data: DataConfig, tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path / "run", steps=5)
    with training(recipe) as trainer:
        assert finish(trainer)
        probe = trainer.probe
        assert probe is not None
        bank, queries = probe.extract(probe.train), probe.extract(probe.val)
        held, asked = (
            torch.nn.functional.normalize(part.features.double(), dim=1) for part in (bank, queries)
        )
        near = bank.ids[(asked @ held.T).topk(5, dim=1).indices]
        wanted = dict(zip(queries.ids.tolist(), near.tolist(), strict=True))
        assert len(probe._examples) == ROWS
        assert all(one.near == wanted[one.id] for one in probe._examples)


def choose_on_rank(ids: list[int], samples: int) -> list[sheet.Example]:
    """On a rank: examples among every `size`th query."""
    world = join(1, False)
    own = torch.tensor(ids)[world.rank :: world.size].flip(0)
    queries = Features(torch.zeros(len(own), 2), own % 3, own)
    near = own[:, None] + torch.arange(9)
    return choose_examples(queries, Neighbours(near.double(), near % 3, near), samples, world)


@pytest.mark.parametrize(
    ("ids", "samples", "chosen"),
    [
        (list(range(80)), 80, list(range(0, 80, 10))),
        ([n for n in range(80) if n % 10 > 4], 80, list(range(5, 80, 10))),
        ([3, 4], 5, [3, 4]),
        (list(range(20)), 80, [0, 10]),
    ],
)
def test_the_choice_is_the_same_for_all_numbers_of_processes(
    ranks: Ranks, ids: list[int], samples: int, chosen: list[int]
) -> None:
    for size in (1, 3):
        for found in ranks.run(choose_on_rank, ids, samples, size=size):
            assert [one.id for one in found] == chosen
            assert all(one.near == [one.id + i for i in range(COLUMNS)] for one in found)
            assert all(one.label == one.id % 3 for one in found)


def test_a_sheet_that_fails_is_one_line(
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> str:
        raise InputError("a shard is gone")

    monkeypatch.setattr(during_training, "write_sheet", fail)
    assert train(tiny.recipe(tiny_data, tmp_path / "run", steps=5))
    output = capsys.readouterr().out
    assert output.count("no sheet of neighbors was drawn: a shard is gone\n") == 1
    assert "report        " in output
    page = read_page(Path(write_report(f"{tmp_path}/run")).read_bytes())
    assert "No sheet of neighbors was drawn yet" in page.text


def test_without_evaluations_there_is_none(tiny_data: DataConfig, tmp_path: Path) -> None:
    baseline = dataclasses.replace(tiny.NO_PROBE, baseline=True)  # of the untrained encoder
    assert train(tiny.recipe(tiny_data, tmp_path / "run", steps=2, probe=baseline))
    assert not (tmp_path / "run" / "neighbours").exists()
