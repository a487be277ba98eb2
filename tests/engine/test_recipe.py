"""Recipes: complete, typed, refused in one line when something is wrong."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from engine.continuation import check_recipe
from engine.log.terminal import Terminal
from engine.method.adamw import AdamWConfig
from engine.method.schedule import ScheduleConfig
from engine.processes.world import World
from engine.recipe import Recipe, in_todays_terms, load, method_fields, operation_names
from engine.run import Run, open_run
from launch.command_line import parse_start
from shards.errors import InputError
from shards.fields import differences, flatten
from shards.loader import DataConfig
from tests.helpers.places import RECIPES, ROOT
from tests.helpers.recipes import parse_recipe

ALL = sorted(path for path in RECIPES.glob("*.py") if path.name != "__init__.py")
ALONE = World(0, 1, 1, torch.device("cpu"))
IMAGENETTE = str(RECIPES / "imagenette.py")
QUICKSTART = str(RECIPES / "quickstart.py")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_is_whole_and_says_what_it_is(path: Path) -> None:
    load(str(path)).check()
    for entry in ("Paper", "Data", "Time", "Expected"):
        assert f"\n{entry}" in path.read_text()


def test_paper_schedules() -> None:
    """The official presets: epochs -> base lr, weight decay, tau base."""
    table = {
        "r50_4096_40ep": (40, 0.45, 1e-6, 0.97),
        "r50_4096_100ep": (100, 0.45, 1e-6, 0.99),
        "r50_4096_300ep": (300, 0.3, 1e-6, 0.99),
        "r50_4096": (1000, 0.2, 1.5e-6, 0.996),
    }
    for name, expected in table.items():
        recipe = load(str(ROOT / "recipes" / f"{name}.py"))
        schedule = recipe.schedule
        decay = recipe.optimizer.weight_decay
        assert (schedule.epochs, schedule.base_lr, decay, schedule.base_tau) == expected
        assert (recipe.batch.size, schedule.warmup) == (4096, "10 epochs")


def test_defaults_are_the_official_method() -> None:
    base = method_fields(load(str(ROOT / "recipes" / "r50_4096.py")))
    plain = method_fields(Recipe())
    assert differences(plain, base) == [
        "data.streams: there 64, here 512",
        "precision: there fp32, here bf16",
    ]


def test_overrides() -> None:
    recipe = parse_recipe([QUICKSTART, "--batch.size", "64", "--compile", "--precision", "fp64"])
    for name in ("--run", "--run-url"):
        assert parse_recipe([QUICKSTART, name, "a"]).run == "a"
    assert (recipe.batch.size, recipe.compile, recipe.precision) == (64, True, "fp64")
    assert recipe.optimizer == load(QUICKSTART).optimizer


def test_what_the_recipe_file_says_is_kept_beside_the_command_line(tmp_path: Path) -> None:
    file = load(QUICKSTART)
    same = ["--seed", str(file.seed), "--run", file.run]
    given = ["--batch.size", "64", "--no-compile-artefacts", "--data.val", "s3://KEY:SECRET@b/v"]
    source = parse_start([QUICKSTART, *given, *same]).source["recipe_file"]
    assert source["file"] == QUICKSTART
    assert source["said"] == {
        "batch.size": file.batch.size,
        "compile_artefacts": True,
        "data.val": file.data.val,
    }
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\nfrom recipes.quickstart import recipe as base\n"
        "recipe = replace(base, run='s3://KEY:SECRET@b/run')\n"
        "def recipe_for(images, epochs=None):\n"
        "    n = epochs or 7\n"
        "    schedule = replace(recipe.schedule, epochs=n, base_lr=images * n)\n"
        "    return replace(recipe, schedule=schedule)\n"
    )
    start = parse_start(
        [
            str(path),
            "--data.draw",
            "50",
            "--schedule.epochs",
            "3",
            "--run",
            "x",
            "--data.train",
            f"{tmp_path}/none",
        ]
    )
    assert start.recipe.schedule.base_lr == 150  # it follows the epochs, and nobody changed it
    assert start.source["recipe_file"]["said"] == {
        "data.draw": file.data.draw,
        "data.train": file.data.train,
        "run": "s3://b/run",
        "schedule.epochs": file.schedule.epochs,
    }


@pytest.mark.parametrize(
    ("given", "every"), [("1 epoch", "1 epoch"), ("0.5epochs", "0.5 epochs"), ("300", 300)]
)
def test_durations_of_the_command_line(given: str, every: int | str) -> None:
    recipe = parse_recipe([QUICKSTART, "--probe.every", given, "--schedule.warmup", given])
    assert (recipe.probe.every, recipe.schedule.warmup) == (every, every)


def test_kinds_of_fields() -> None:
    """What scripts may change at every start, and what decides the result."""
    free = set(operation_names())
    assert {"run", "steps", "threads", "compile", "data.train", "log.every"} <= free
    assert {"checkpoint.every", "checkpoint.resume", "parallel.strategy"} <= free
    method = method_fields(load(QUICKSTART)).keys()
    assert {"seed", "batch.size", "batch.micro", "precision", "data.streams"} <= method
    assert {"optimizer", "optimizer.betas", "views.view1.blur", "schedule.epochs"} <= method
    assert not free & method


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "usage"),
        (["recipes/nothing.py"], "no such recipe file"),
        ([QUICKSTART, "--bach.size", "3"], "did you mean --batch.size?"),
        ([QUICKSTART, "--learning-rate", "3"], "unknown field --learning-rate"),
        ([QUICKSTART, "stray"], "unexpected argument 'stray'"),
        ([QUICKSTART, "--run", "s3://"], "run s3://: names no bucket or folder"),
        ([QUICKSTART, "--data.val", "s3:/bucket/val"], "data.val s3:/bucket/val: a URL has two"),
        ([QUICKSTART, "--batch.size", "many"], "--batch.size"),
        ([QUICKSTART, "--batch.size"], "--batch.size"),
        ([QUICKSTART, "--precision", "fp12"], "--precision"),
        ([QUICKSTART, "--views.view1.flip", "3"], "views.view1.flip must be from 0 to 1, not 3"),
        ([QUICKSTART, "--views.size", "7"], "views.size must be from 8 to 4096, not 7"),
        ([QUICKSTART, "--batch.size", "0"], "batch.size must be from 2"),
        ([QUICKSTART, "--model.hidden", "1"], "model.hidden must be from 2"),
        ([QUICKSTART, "--model.projection", "1"], "model.projection must be from 2"),
        ([QUICKSTART, "--batch.micro", "100"], "batch.micro must be from 1 to 64"),
        ([QUICKSTART, "--model.encoder.width", "nan"], "model.encoder.width must be from"),
        ([QUICKSTART, "--schedule.epochs", "inf"], "schedule.epochs must be from"),
        ([QUICKSTART, "--schedule.base-tau", "2"], "schedule.base_tau must be from 0 to 1"),
        ([QUICKSTART, "--checkpoint.every", "-1"], "checkpoint.every must be at least 0, not -1"),
        (
            [QUICKSTART, "--probe.every", "often"],
            "probe.every takes a number of steps or of epochs",
        ),
        ([QUICKSTART, "--log.every", "0 epochs"], "log.every must be more than 0, not 0"),
        ([QUICKSTART, "--schedule.warmup", "15 epochs"], "must be at most schedule.epochs 14, not"),
        ([QUICKSTART, "--views.view2.brightness", "-1"], "views.view2.brightness must be from 0"),
        ([QUICKSTART, "--views.view2.hue", "0.6"], "views.view2.hue must be from 0 to 0.5"),
        ([QUICKSTART, "--views.view1.blur-sigma", "2", "1"], "blur_sigma must be two rising"),
        ([QUICKSTART, "--views.area", "0", "1"], "views.area must be more than 0"),
        ([QUICKSTART, "--optimizer.betas", "0.9", "1"], "optimizer.betas must be at least 0 and"),
        ([IMAGENETTE, "--optimizer.momentum", "1"], "optimizer.momentum must be at least 0 and"),
        ([IMAGENETTE, "--optimizer.momentum", "nan"], "optimizer.momentum must be at least 0"),
        ([IMAGENETTE, "--optimizer.trust-coefficient", "0"], "optimizer.trust_coefficient must be"),
        ([QUICKSTART, "--threads", "100000000"], "threads must be from 1 to 1024"),
        ([QUICKSTART, "--run", ""], "run is not set"),
        ([QUICKSTART, "--data.train", ""], "data.train is not set"),
        ([QUICKSTART, "--schedule.epochs", "0"], "schedule.epochs"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_recipe(arguments)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("x = 1", "defines no `recipe`"),
        ("recipe = 3", "defines no `recipe`"),
        (
            "from engine.recipe import Recipe\nclass Mine(Recipe): ...\nrecipe = Mine()",
            "Recipe itself, but one of a class derived from it",
        ),
        ("a = 1\nimport nothing_here", "line 2: ModuleNotFoundError"),
        ("recipe = (", "line 1: SyntaxError"),
        ("import sys\nsys.exit()", "line 2: SystemExit"),
        ("raise RuntimeError('one\\ntwo')", "RuntimeError: one two"),
    ],
)
def test_unreadable_recipe_file(tmp_path: Path, source: str, text: str) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(source)
    with pytest.raises(InputError) as error:
        load(str(path))
    assert text in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_warm_up_in_epochs_is_the_same_as_before() -> None:
    """Runs of earlier versions have schedule.warmup_epochs, a number."""
    for before, now in ((10, "10 epochs"), (0.5, "0.5 epochs"), (1 / 3, f"{1 / 3} epochs"), (0, 0)):
        recipe = dataclasses.replace(load(QUICKSTART), schedule=ScheduleConfig(warmup=now))
        there = method_fields(recipe) | {"schedule.warmup_epochs": before}
        del there["schedule.warmup"]
        assert differences(in_todays_terms(there), method_fields(recipe)) == []
        there["schedule.warmup_epochs"] = before + 1
        assert len(differences(in_todays_terms(there), method_fields(recipe))) == 1
    strange = {"schedule.warmup_epochs": "many"}
    assert in_todays_terms(strange).items() >= strange.items()


def test_run_of_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    recipe = dataclasses.replace(load(QUICKSTART), run=str(tmp_path))
    open_run(recipe, "aaaa", ALONE, Terminal(main=True))  # nothing there yet
    Run(recipe, "aaaa", ALONE, Terminal(main=True), None).write_recipe()
    open_run(dataclasses.replace(recipe, steps=7, threads=3), "aaaa", ALONE, Terminal(main=True))
    with pytest.raises(InputError, match="seed: there 0, here 1"):
        open_run(dataclasses.replace(recipe, seed=1), "aaaa", ALONE, Terminal(main=True))
    with pytest.raises(InputError, match=r"digest of data\.train: there aaaa, here bbbb"):
        open_run(recipe, "bbbb", ALONE, Terminal(main=True))
    other = dataclasses.replace(recipe, optimizer=AdamWConfig(betas=(0.8, 0.9)))
    with pytest.raises(InputError, match=r"optimizer\.betas"):
        open_run(other, "aaaa", ALONE, Terminal(main=True))


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_damaged_recipe_json_is_reported(tmp_path: Path, content: str) -> None:
    recipe = dataclasses.replace(load(QUICKSTART), run=str(tmp_path))
    (tmp_path / "recipe.json").write_text(content)
    reports: list[str] = []
    terminal = Terminal(main=True)
    terminal.report = reports.append  # type: ignore[assignment, method-assign]
    open_run(recipe, "aaaa", ALONE, terminal)
    assert "damaged" in reports[0]


def test_recipe_json_holds_no_secrets(tmp_path: Path) -> None:
    data = DataConfig(train="s3://user:canary1@host/train", val="https://host/val?sign=canary2")
    recipe = dataclasses.replace(load(QUICKSTART), run=str(tmp_path), data=data)
    Run(recipe, "aaaa", ALONE, Terminal(main=True), None).write_recipe()
    text = (tmp_path / "recipe.json").read_text()
    assert "canary" not in text
    assert "s3://host/train" in text


def test_recipe_json_has_every_field(tmp_path: Path) -> None:
    recipe = dataclasses.replace(load(QUICKSTART), run=str(tmp_path))
    Run(recipe, "aaaa", ALONE, Terminal(main=True), None).write_recipe()
    document = json.loads((tmp_path / "recipe.json").read_text())
    assert document.keys() == flatten(recipe).keys() | {"index_digest"}
    assert document["optimizer"] == "AdamWConfig"


def test_recipe_json_has_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation may start in another folder; a run continues under either name."""
    monkeypatch.chdir(tmp_path)
    recipe = dataclasses.replace(load(QUICKSTART), run="runs/mine")
    Run(recipe, "aaaa", ALONE, Terminal(main=True), None).write_recipe()
    document = json.loads((tmp_path / "runs" / "mine" / "recipe.json").read_text())
    assert document["run"] == f"{tmp_path}/runs/mine"
    assert document["data.train"] == f"{tmp_path}/data/quickstart/train"
    check_recipe(recipe, "aaaa", print)
    check_recipe(dataclasses.replace(recipe, run=f"{tmp_path}/runs/mine"), "aaaa", print)
