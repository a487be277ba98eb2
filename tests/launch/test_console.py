"""The commands that pip installs, and what train.py says before it has a recipe."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from launch import console
from shards.loader import DataConfig
from tests.helpers.places import RECIPES, ROOT
from tests.helpers.recipes import parse_recipe

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def start(name: str, *arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    """Run an installed command as pip's own file for it does, away from the clone."""
    module, _, function = SCRIPTS[name].partition(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=where,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_every_program_has_a_command() -> None:
    assert set(SCRIPTS) == {"byol-train", "byol-pack", "byol-evaluate", "byol-export"}
    for place in SCRIPTS.values():
        module, _, function = place.partition(":")
        assert callable(getattr(import_module(module), function))
        assert (ROOT / "launch" / f"{function}.py").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("byol-train", ["quickstart", "--lr", "3"], "unknown field --lr: did you mean"),
        ("byol-pack", ["nowhere", "out"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_a_failure(
    tmp_path: Path, name: str, arguments: list[str], text: str
) -> None:
    done = start(name, *arguments, where=tmp_path)
    assert done.returncode == 1, done.stderr
    check_error(done.stderr, text)


def check_error(told: str, text: str) -> None:
    (line,) = told.strip().splitlines()
    assert line.startswith("error: ")
    assert text in line


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [(console.evaluate, ["knn", "nowhere"]), (console.export, ["nowhere", "out"])],
    ids=["evaluate", "export"],
)
def test_other_commands_run_their_scripts(
    command: Callable[[], None],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["byol", *arguments])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 1
    check_error(capsys.readouterr().err, "nowhere")


def test_a_command_trains(tmp_path: Path, tiny_data: DataConfig) -> None:
    done = start(
        *("byol-train", "quickstart", "--data.train", tiny_data.train, "--data.val", tiny_data.val),
        *("--run", "run", "--steps", "2", "--batch.size", "16", "--probe.no-baseline"),
        *("--threads", "1", "--probe.every", "0"),
        where=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_00000002" / "commit.json").exists()


def test_the_requirements_are_checked_before_the_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this project were installed beside a torch that is too old."""
    info = tmp_path / "byol_engine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: byol-engine\nVersion: 1\nRequires-Dist: torch>=999\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    code = "from launch.console import train; train()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "torch" in done.stderr
    assert done.stderr.startswith("error: ")
    assert "is installed, but torch>=999 is needed" in done.stderr


def test_the_imports_of_a_command_are_light() -> None:
    """So that the check of the requirements comes before what needs them."""
    code = "import sys, launch.console; assert not {'torch', 'tyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert console.train.__module__ == "launch.console"


def test_help_without_a_recipe_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "-h"):
        with pytest.raises(SystemExit) as stop:
            parse_recipe([option])
        assert not stop.value.code
        shown = capsys.readouterr().out
        for path in RECIPES.glob("[!_]*.py"):
            first = path.read_text().removeprefix('"""').partition("\n")[0]
            assert f"  {path.stem:<16} {first}\n" in shown
        assert "RECIPE --help lists all fields" in shown
        assert "--batch.size 512" in shown
        assert max(map(len, shown.splitlines())) < 125


def test_a_recipe_is_sized_by_the_images_of_the_command_line(tiny_data: DataConfig) -> None:
    """104 images: 8 batches of at most 13 images. What is given comes after that."""
    data = ["--data.train", tiny_data.train, "--data.val", tiny_data.val]
    recipe = parse_recipe(["own_images", *data])
    assert (recipe.batch.size, recipe.data.streams, recipe.schedule.epochs) == (8, 8, 1000)
    recipe = parse_recipe(["own_images", *data, "--batch.size", "16", "--schedule.epochs", "10"])
    assert (recipe.batch.size, recipe.schedule.epochs) == (16, 10)
    for epochs, warmup, every in (("2", "0.5 epochs", "1 epoch"), ("50", "5 epochs", "5 epochs")):
        recipe = parse_recipe(["own_images", *data, "--schedule.epochs", epochs])
        assert (recipe.schedule.warmup, recipe.probe.every) == (warmup, every)


def test_a_recipe_is_sized_by_the_images_that_will_be_drawn(tmp_path: Path) -> None:
    where = ["--data.train", f"{tmp_path}/train", "--data.val", f"{tmp_path}/val"]
    recipe = parse_recipe(["own_images", *where, "--data.draw", "2000"])
    assert recipe.batch.size == 128
    assert not list(tmp_path.iterdir())
