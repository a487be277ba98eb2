"""--profile: which steps are profiled, where it goes, and what is refused."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from engine.log.profiling import MOST_STEPS, parse_steps
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.helpers import tiny
from tests.helpers.training import train


def test_a_trace_and_a_table_of_some_steps(tiny_data: DataConfig, store: str) -> None:
    run = files.join(store, "run")
    config = tiny.recipe(tiny_data, run, steps=5, probe=tiny.NO_PROBE, profile="2:3")
    train(config)
    names = files.list_names(files.join(run, "profile"))
    assert names == ["steps_00000002-00000003.json.gz", "steps_00000002-00000003.txt"]
    trace, table = (files.read(files.join(run, "profile", name)) for name in names)
    events = json.loads(gzip.decompress(trace))["traceEvents"]
    steps = [e for e in events if e.get("name") == "Optimizer.step#LARS.step"]
    assert len(steps) == 2
    rows = [line for line in table.decode().splitlines() if "aten::" in line]
    assert 1 < len(rows) <= 10
    assert any("convolution" in row for row in rows)


def test_a_start_that_ends_or_begins_among_the_steps(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.recipe(tiny_data, tmp_path, probe=tiny.NO_PROBE, profile="2:5")
    for steps in (3, 6, 7):
        train(dataclasses.replace(config, steps=steps))
    names = sorted(path.name for path in (tmp_path / "profile").glob("*.txt"))
    assert names == ["steps_00000002-00000003.txt", "steps_00000004-00000005.txt"]
    told = [line for line in capsys.readouterr().out.splitlines() if "nothing is profiled" in line]
    assert len(told) == 1
    assert "profile 2:5" in told[0]
    assert "steps 7 to 7" in told[0]


def test_a_profile_that_cannot_be_written(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.joinpath("profile", "steps_00000001-00000001.txt").mkdir(parents=True)
    train(tiny.recipe(tiny_data, tmp_path, steps=2, probe=tiny.NO_PROBE, profile="1:1"))
    output = capsys.readouterr().out
    assert "the profile could not be written" in output
    assert "2 of 20 steps done" in output


@pytest.mark.parametrize(("text", "steps"), [("", []), ("1:1", [1]), (" 3 : 5 ", [3, 4, 5])])
def test_steps(text: str, steps: list[int]) -> None:
    assert list(parse_steps(text)) == steps


@pytest.mark.parametrize(
    "text", ["3", "3:", ":3", "0:2", "5:3", "1:2:3", "a:b", "-1:2", "1:1e3", f"1:{MOST_STEPS + 1}"]
)
def test_mistakes_name_the_field_and_a_remedy(
    tiny_data: DataConfig, tmp_path: Path, text: str
) -> None:
    with pytest.raises(InputError, match=r"^profile .*: give FIRST:LAST.*such as 10:12"):
        tiny.recipe(tiny_data, tmp_path, profile=text).check()


def test_a_finished_run_says_how_to_profile_and_keeps_its_recipe(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.recipe(tiny_data, tmp_path, steps=1, probe=tiny.NO_PROBE)
    train(config)
    before = (tmp_path / "recipe.json").read_bytes()
    train(dataclasses.replace(config, profile="1:1"))
    told = [line for line in capsys.readouterr().out.splitlines() if "nothing is profiled" in line]
    assert len(told) == 1
    assert "step 1 was the last one: give a larger --steps or" in told[0]
    assert (tmp_path / "recipe.json").read_bytes() == before
