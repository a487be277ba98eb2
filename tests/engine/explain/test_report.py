"""--explain: it prints all that it knows, says what is missing, and touches nothing."""

import dataclasses
import re
from pathlib import Path

import pytest

from engine.explain.report import explain
from engine.log.terminal import Terminal
from engine.processes.world import join
from engine.recipe import Recipe
from shards.errors import InputError
from shards.loader import DataConfig
from shards.order import BatchConfig
from tests.helpers import tiny
from tests.helpers.training import train


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
        "without a cache",
        "written until the end",
    ):
        assert words in text, words
    assert "not read" not in text


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


def test_a_block_of_several_streams(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(tiny.recipe(tiny_data, tmp_path / "run"), capsys)
    assert "It is 1 block, and each of the 4 streams (data.streams) fetches" in text
    one = dataclasses.replace(tiny_data, streams=1)
    assert "It is 1 block" not in printed(tiny.recipe(one, tmp_path / "run"), capsys)


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
