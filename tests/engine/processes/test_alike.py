"""Processes that cannot work together are refused before they wait for each other."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from socket import gethostname

import pytest
import torch

from engine.processes import alike
from engine.processes.launcher import connect
from engine.recipe import Recipe
from shards.errors import InputError
from shards.loader import DataConfig
from tests.engine.processes.test_world import recipe, train
from tests.helpers.places import ROOT
from tests.helpers.ranks import RankFailure, Ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def meet(devices: list[torch.device]) -> str:
    """On a rank: compare the devices, and return what is wrong with them."""
    rank, size = int(os.environ["RANK"]), len(devices)
    store, told = connect(timedelta(seconds=60)), ""
    try:
        alike.check_devices(store, devices[rank], size)
    except InputError as error:
        told = str(error)
    store.set(f"done {rank}", "")
    if rank == 0:  # it hosts the store
        store.wait([f"done {one}" for one in range(size)])
    return told


def test_a_process_without_a_gpu_beside_others_that_have_one(ranks: Ranks) -> None:
    assert ranks.run(meet, [CPU] * 3, size=3) == ["", "", ""]
    assert ranks.run(meet, [GPU] * 3, size=3) == ["", "", ""]
    told = ranks.run(meet, [GPU, CPU, GPU], size=3)
    assert all("2 of 3 processes have a GPU and the others do not" in text for text in told)
    assert ["has one" in text for text in told] == [True, False, True]


def train_other_code(config: Recipe, root: Path) -> int:
    """On a rank: train; the last rank takes its code from `root`."""
    if os.environ["RANK"] == "1":
        alike._ROOT = root
    try:
        return train(config)
    finally:
        alike._ROOT = ROOT


def test_other_code_is_refused(ranks: Ranks, tiny_data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "trainer.py").write_text("step = 1\n")
    config = recipe(tiny_data, tmp_path / "run", steps=1)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train_other_code, config, tmp_path, size=2)
    assert str(failure.value).count("different runs (code of this package: there ") == 2
    assert not (tmp_path / "run").exists()


def load_elsewhere(config: Recipe) -> int:
    """On a rank: train; the data is not on the machine of the last rank."""
    if os.environ["RANK"] == "1":
        config = replace(config, data=replace(config.data, train=f"{config.run}/nothing"))
    return train(config)


def test_a_fault_of_one_machine_names_it(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path
) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks.run(load_elsewhere, recipe(tiny_data, tmp_path / "run", steps=1), size=2)
    assert str(failure.value).count(f"(told by rank 1 on {gethostname()})") == 2
