"""The recipe of a run, from its recipe.json."""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import load_recipe, open_session, recipe_files
from engine.method.adamw import AdamWConfig
from engine.method.byol import BYOLConfig
from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.method.torchvision_encoder import TorchvisionConfig
from engine.recipe import Recipe, load, method_fields
from engine.run import _write_recipe
from engine.state import layout, origin
from launch import train as command
from shards.errors import InputError
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.places import GOLDEN
from tests.helpers.recipes import parse_recipe
from tests.helpers.training import train


def test_a_run_is_opened_and_goes_on(tiny_data: DataConfig, tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path / "run")
    train(replace(recipe, steps=4))
    for url in (recipe.run, f"{recipe.run}/", f"{recipe.run}/recipe.json"):
        assert load_recipe(url) == replace(recipe, steps=4)
    moved = tmp_path / "moved"
    shutil.move(recipe.run, moved)
    with open_session(load_recipe(moved), continue_run=True) as session:
        assert session.trainer.step == 4
        session.step()


def test_options_of_the_command_line_are_kept(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of own_images, whose other fields follow the number of images."""
    monkeypatch.chdir(tmp_path)
    small = "--model.encoder.depth 10 --model.encoder.width 0.125 --model.hidden 32"
    given = f"--data.train {tiny_data.train} --data.val {tiny_data.val} --views.size 32 --run mine"
    arguments = f"own_images {given} {small} --model.projection 16 --steps 1 --threads 1".split()
    assert command.main(arguments) == 0
    recipe = load_recipe("mine")
    assert recipe == replace(parse_recipe(arguments), run="mine")
    with open_session(recipe, continue_run=True) as session:
        assert session.trainer.step == 1


@pytest.mark.parametrize("name", recipe_files.shipped())
def test_every_recipe_survives(name: str, tmp_path: Path) -> None:
    encoder = BYOLConfig(encoder=TorchvisionConfig(name="mobilenet_v3_small"))
    stock = TorchOptimizerConfig(name="RAdam", options=("betas=0.8,0.99",))
    run = str(tmp_path / "run")
    data = DataConfig(train="/data/train")
    changes: tuple[dict[str, Any], ...] = ({}, {"model": encoder, "optimizer": stock})
    for one in (*changes, {"optimizer": AdamWConfig(betas=(0.5, 0.9))}):
        recipe = replace(load(name), run=run, data=data, **one)
        _write_recipe(recipe, {origin.DIGEST: "0", layout.TOTAL: 7})
        assert load_recipe(run) == recipe


def test_a_run_of_the_first_release_is_read(tmp_path: Path) -> None:
    with tarfile.open(GOLDEN / "first_release.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    recipe = load_recipe(tmp_path / "run")
    assert recipe.schedule.warmup == "0.5 epochs"
    assert recipe.model.encoder.describe()


def test_what_is_no_recipe_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, run = Recipe(run="run", data=DataConfig(train="/d")), tmp_path / "run"
    _write_recipe(recipe, origin.describe_source("/my/mine.py", {}))
    for given, words in (("run/recipe.json", "is JSON"), ("run", "is a run")):
        assert command.main([given]) == 1
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1
        assert words in told[0]
        assert "/my/mine.py" in told[0]
        assert "load_recipe(RUN)" in told[0]
    (tmp_path / "other.json").write_text("[]")
    assert command.main(["other.json"]) == 1
    assert "is JSON, and a recipe file is Python" in capsys.readouterr().err
    fields = json.loads((run / "recipe.json").read_text())
    for change, match in (
        ({"seed": "x"}, r"recipe\.json: seed must be a whole number, not a text"),
        ({"seed": -1}, "seed must be"),
        ({"new": 1}, r"does not know \('new'\): use the version of this engine that wrote it"),
        ({"optimizer": "Recipe"}, "optimizer must be one of LARSConfig"),
        ({"data.val": "ftp://x/y"}, r"data\.val 'ftp.* is not opened"),
    ):
        (run / "recipe.json").write_text(json.dumps(fields | change))
        with pytest.raises(InputError, match=match):
            load_recipe("run")
    del fields["seed"]
    (run / "recipe.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"lacks fields \('seed'\)"):
        load_recipe("run")
    for text in ("{", "[]"):
        (run / "recipe.json").write_text(text)
        with pytest.raises(InputError, match="is damaged: take the recipe file"):
            load_recipe("run")
    with pytest.raises(InputError, match="no such file: give a recipe file, or the URL of a run"):
        load_recipe(tmp_path)
    with pytest.raises(InputError, match="no such recipe file"):
        load_recipe("nothing")
    with pytest.raises(InputError, match=r"is inside of memory:.*: give the folder of a run"):
        load_recipe("memory://x/run/checkpoints/step_00000100")


def test_names_are_those_of_the_run_directory() -> None:
    assert (recipe_files.RECORDED, recipe_files.FILE) == (layout.RECIPE, origin.SOURCE)
    assert "seed" in method_fields(Recipe())
