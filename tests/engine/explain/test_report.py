"""--explain: it prints all that it knows, says what is missing, and touches nothing."""

import dataclasses
import re
import secrets
from pathlib import Path
from typing import Any

import pytest

from engine.explain.report import explain
from engine.log.terminal import Terminal
from engine.method.schedule import ScheduleConfig
from engine.processes.parallel import ParallelConfig
from engine.processes.world import join
from engine.recipe import Recipe
from shards.errors import InputError
from shards.loader import DataConfig
from shards.making import synthetic
from shards.order import BatchConfig
from tests.engine.evaluation.test_probe_sets import write_folder
from tests.helpers import tiny
from tests.helpers.training import open_trainer, train


def printed(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    explain(recipe, join(1, False), Terminal(True))
    return capsys.readouterr().out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_explained_from_its_log(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path / "run", steps=8, probe=tiny.NO_PROBE)
    train(recipe)
    before = contents(tmp_path)
    text = re.sub(" +", " ", printed(recipe, capsys))
    assert contents(tmp_path) == before
    for words in (
        "online encoder",
        "16 images on 1 process",
        "20 steps",
        "newest checkpoint 8 ",
        "--steps",
        "one process",
        "a year of training at this pace would write",
        "the median of the run's last 8 logged steps",
        "from the disk up to ",
        "written until the end",
    ):
        assert words in text, words
    assert "not read" not in text
    assert not re.search("GETs|requests|without a cache", text)


def test_what_is_not_there_is_said(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataclasses.replace(tiny_data, train=str(tmp_path / "none"))
    recipe = tiny.recipe(data, tmp_path / "run", explain_processes=4)
    text = printed(recipe, capsys)
    assert "no index.json there" in text
    assert "give --explain-speed" in text
    assert "fsdp (4 to a group)" in text
    assert "The processes of a group share out" in text
    assert "with --explain-images N" in text
    drawn = dataclasses.replace(recipe, data=dataclasses.replace(data, draw=104))
    text = printed(dataclasses.replace(drawn, explain_speed=100.0), capsys)
    assert "20 steps" in text
    assert "at 400.0 images a second of all processes" in text
    assert not any(tmp_path.iterdir())


def test_dates_before_the_data_is_there(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of images takes the place of data.train, which may even be left out."""
    recipe = tiny.recipe(
        dataclasses.replace(tiny_data, train=""),
        tmp_path / "run",
        explain=True,
        explain_images=2 * tiny.SAMPLES,
        explain_speed=100.0,
    )
    recipe.check()
    text = printed(recipe, capsys)
    assert "208 images, 40 steps" in text
    assert "no data was looked at" in text
    assert not re.search("GETs|not read", text)
    with pytest.raises(InputError, match=r"data\.train is not set"):
        dataclasses.replace(recipe, explain=False).check()
    with pytest.raises(InputError, match=r"fewer than batch\.size"):
        printed(dataclasses.replace(recipe, explain_images=10), capsys)


def test_a_block_of_several_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = f"memory://{secrets.token_hex(6)}"
    synthetic.write(f"{home}/train", tiny.SAMPLES, 32, seed=0)
    data = DataConfig(train=f"{home}/train", streams=4)
    text = re.sub(" +", " ", printed(tiny.recipe(data, tmp_path / "run"), capsys))
    assert "It is 1 block, and each of the 4 streams (data.streams) fetches" in text
    assert "without a cache up to 4 GETs" in text
    assert "requests under way" in text
    one = dataclasses.replace(data, streams=1)
    assert "It is 1 block" not in printed(tiny.recipe(one, tmp_path / "run"), capsys)


def refused_too(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> str:
    """What both --explain, after its tables, and a start refuse, in the same words."""
    before = contents(Path(recipe.run).parent)
    with pytest.raises(InputError) as told:
        printed(recipe, capsys)
    assert "Checkpoints" in capsys.readouterr().out
    assert contents(Path(recipe.run).parent) == before
    with pytest.raises(InputError) as started:
        open_trainer(recipe)
    assert str(told.value) == str(started.value)
    return str(told.value)


def test_sets_that_a_start_refuses(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = write_folder(f"{tmp_path}/l/train", 2), write_folder(f"{tmp_path}/l/val", 2)
    other = write_folder(f"{tmp_path}/other", 2, ("x", "checks"))
    recipe = tiny.recipe(tiny_data, tmp_path / "run")

    def with_sets(own_val: str = "", **places: Any) -> Recipe:
        data = dataclasses.replace(tiny_data, val=own_val)
        probe = dataclasses.replace(recipe.probe, **places)
        return dataclasses.replace(recipe, data=data, probe=probe)

    for changed, words in (
        (with_sets(train=f"{tmp_path}/l"), "probe.train .* holds the splits train and val"),
        (with_sets(train=splits[0], val=other), "probe.val has other classes than probe.train"),
        (with_sets(f"{tmp_path}/none"), "data.val .*: no index.json there"),
        (with_sets(tiny_data.val, train=splits[0]), "data.val has other .* or give --probe.val"),
    ):
        assert re.match(words, refused_too(changed, capsys))
    best = dataclasses.replace(recipe.checkpoint, keep_best="knn_top1")
    text = refused_too(dataclasses.replace(with_sets(), checkpoint=best), capsys)
    assert "checkpoint.keep_best knn_top1 cannot be measured" in text
    text = printed(with_sets(train=splits[0]), capsys)
    assert "no kNN, because data.val is not set: give --probe.val URL, which has labels" in text
    assert "measure no kNN" not in printed(with_sets(train=splits[0], val=splits[1]), capsys)


def test_a_run_of_another_recipe_is_refused(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path / "run", steps=1)
    train(recipe)
    text = refused_too(dataclasses.replace(recipe, seed=3), capsys)
    assert "is of another recipe or data set (seed: there 0, here 3)" in text


def test_what_cannot_run_is_refused(tiny_data: DataConfig, tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path / "run")
    missing = dataclasses.replace(tiny_data, train=str(tmp_path / "none"))
    for changes, match in (
        ({"explain_processes": 5}, "5 processes but data.streams is 4"),
        ({"batch": BatchConfig(size=18)}, "batch.size 18 is not divisible"),
        ({"batch": BatchConfig(size=18), "data": missing}, "batch.size 18 is not divisible"),
        # To try all numbers up to this one would take minutes.
        ({"batch": BatchConfig(size=2**31 - 1), "data": missing}, "use --data.streams 1 or"),
        ({"batch": BatchConfig(size=16, micro=8), "data": missing}, "batch.micro 8"),
        ({"batch": BatchConfig(size=200)}, "fewer than batch.size"),
        ({"schedule": ScheduleConfig(rewarm=2)}, "schedule.rewarm 2: the ramp is that of a branch"),
        ({"parallel": ParallelConfig(shard=2)}, "parallel.shard 2 is for hsdp"),
        ({"parallel": ParallelConfig("hsdp")}, "1 process cannot form two or more groups of 1"),
        (
            {"parallel": ParallelConfig("hsdp", 3), "explain_processes": 4},
            "4 processes cannot form two or more groups of 3.*: use --parallel.shard 2",
        ),
    ):
        with pytest.raises(InputError, match=match):
            explain(dataclasses.replace(recipe, **changes), join(1, False), Terminal(True))


def test_one_image_of_a_process(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path / "run", batch=BatchConfig(size=4, micro=1))
    assert "images of a process 1" in re.sub(
        " +", " ", printed(dataclasses.replace(recipe, explain_processes=4), capsys)
    )


def test_the_memory_of_loading_processes_is_told(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "One or two processes that load its images take about 0.5 GiB each."
    for own, expected in ((None, True), (False, False)):
        data = dataclasses.replace(tiny_data, own_process=own)
        text = " ".join(printed(tiny.recipe(data, tmp_path / "run"), capsys).split())
        assert (told in text) == expected


def test_the_memory_of_a_cuda_graph_is_told(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path / "run")
    line = "One process with --cuda-graph needs a step's other tensors twice."
    assert line not in printed(recipe, capsys)
    assert line in printed(dataclasses.replace(recipe, cuda_graph=True), capsys)
