"""A start that is refused, or that only looks, leaves nothing behind and does no work before."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from engine.debug import debug_step
from engine.evaluation.during_training import ProbeConfig
from engine.method.byol import BYOLConfig
from engine.recipe import Recipe
from engine.state.checkpoint import CheckpointConfig
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.helpers import tiny
from tests.helpers.training import train, training


def with_wrong_start(recipe: Recipe, url: str) -> Recipe:
    encoder = recipe.model.encoder
    model: BYOLConfig = dataclasses.replace(recipe.model, encoder=encoder, start=f"{url}/none.pt")
    return dataclasses.replace(recipe, model=model)


def with_wrong_branch(recipe: Recipe, url: str) -> Recipe:
    config: CheckpointConfig = dataclasses.replace(recipe.checkpoint, branch=f"{url}/none")
    return dataclasses.replace(recipe, checkpoint=config)


def objects(url: str) -> list[str]:
    return sorted(name for name, _ in files.walk(url) if name)  # some stores keep empty folders


@pytest.mark.parametrize("spoil", [with_wrong_start, with_wrong_branch])
def test_nothing_is_packed_and_nothing_stays(
    spoil: Any, tiny_data: DataConfig, store: str, photo_folder: Path
) -> None:
    run = files.join(store, "runs", "one")
    probe = ProbeConfig(every=4, train=str(photo_folder), val=str(photo_folder))
    recipe = tiny.recipe(tiny_data, run, steps=1, probe=probe)
    with pytest.raises(InputError, match="none"):
        train(spoil(recipe, store))
    assert objects(files.join(store, "runs")) == []
    if files.is_local(store):
        assert not Path(store, "runs").exists()


def test_what_was_there_before_stays(tiny_data: DataConfig, tmp_path: Path) -> None:
    """The user's own folder with a note, and a run that is started with a wrong field later."""
    run = tmp_path / "mine"
    run.mkdir()
    (run / "note.txt").write_text("mine")
    recipe = tiny.recipe(tiny_data, run, steps=1, probe=tiny.NO_PROBE)
    with pytest.raises(InputError):
        train(with_wrong_start(recipe, str(tmp_path)))
    assert objects(str(run)) == ["note.txt"]
    train(recipe)
    before = set(objects(str(run)))
    with pytest.raises(InputError):
        train(with_wrong_start(recipe, str(tmp_path)))
    assert {name for name in objects(str(run)) if "lease" not in name} == {
        name for name in before if "lease" not in name
    }
    assert (run / "lease").exists()  # its numbers only rise


def test_a_debug_step_removes_the_folders_that_it_made(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path / "runs" / "one", debug_step=True)
    with training(recipe) as trainer:
        debug_step(trainer)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_comes_alone(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be measured is told after all checks, or as the reason of a refusal."""
    data = dataclasses.replace(tiny_data, val="")
    recipe = tiny.recipe(data, tmp_path / "run", steps=1, probe=ProbeConfig(every=1))
    best = CheckpointConfig(keep_best="knn_top1")
    with pytest.raises(InputError, match=r"keep_best knn_top1 .*because data.val is not set"):
        train(dataclasses.replace(recipe, checkpoint=best))
    assert "measure no kNN" not in capsys.readouterr().out
    train(recipe)
    assert capsys.readouterr().out.count("measure no kNN, because data.val is not set") == 1
