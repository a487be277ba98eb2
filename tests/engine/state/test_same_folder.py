"""Machines with a disk of their own: their runs are not one run, and the start says so."""

import os
from pathlib import Path

import pytest

from engine.recipe import Recipe
from engine.state import same_folder
from shards.loader import DataConfig
from tests.engine.processes.test_world import recipe, train
from tests.helpers.ranks import RankFailure, Ranks


def train_at(runs: list[Recipe]) -> int:
    """On a rank: train in a run directory of its own."""
    same_folder.PATIENCE = 0.2
    return train(runs[int(os.environ["RANK"])])


def test_a_run_on_two_disks_is_refused(ranks: Ranks, tiny_data: DataConfig, tmp_path: Path) -> None:
    """Each disk would have a part of every checkpoint."""
    here, there = (recipe(tiny_data, tmp_path / name, steps=3) for name in ("here", "there"))
    with pytest.raises(RankFailure) as failure:
        ranks.run(train_at, [here, there], size=2)
    assert str(failure.value).count("rank 1 on ") == 2, "both processes end with this line"
    assert "a --run-url that is the same folder for all machines" in str(failure.value)
    assert not (tmp_path / "here").exists()
    assert not (tmp_path / "there").exists()


def test_one_folder_may_have_two_paths(ranks: Ranks, tiny_data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "here")
    paths = [recipe(tiny_data, tmp_path / name, steps=1) for name in ("here", "there")]
    assert ranks.run(train_at, paths, size=2) == [1, 1]
