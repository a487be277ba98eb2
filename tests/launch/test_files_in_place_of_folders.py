"""Where a folder is to be written and a file is in its place, one line says so before any work."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from engine.recipe import Recipe
from launch import evaluate, export, pack
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.helpers import tiny


@pytest.fixture(params=["", "/below/it"], ids=["file", "below"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "file").write_text("kept")
    return f"{tmp_path}/file{request.param}"


def told(name: str, url: str) -> str:
    return f"{name} {url}: .*/file is no folder: choose another$"


def test_a_run_is_refused(tiny_data: DataConfig, place: str) -> None:
    recipe: Recipe = tiny.recipe(tiny_data, "elsewhere")
    with pytest.raises(InputError, match=told("run", place)):
        replace(recipe, run=place).check()
    with pytest.raises(InputError, match=told("data.cache", place)):
        replace(recipe, data=replace(recipe.data, cache=place)).check()
    with pytest.raises(InputError, match=told("compile_folder", place)):
        replace(recipe, compile_folder=place).check()


@pytest.mark.parametrize(
    ("program", "arguments", "name"),
    [
        (evaluate, ["knn", "NONE", "--out", "PLACE"], "--out"),
        (evaluate, ["features", "NONE", "NONE", "PLACE"], "OUT"),
        (evaluate, ["features", "NONE", "NONE", "PLACE/features.npz"], "OUT"),
        (evaluate, ["report", "NONE", "--out", "PLACE/report.html"], "--out"),
        (export, ["NONE", "PLACE"], "OUT"),
    ],
    ids=["knn", "features", "one file", "report", "export"],
)
def test_results_are_refused(
    program: ModuleType,
    arguments: list[str],
    name: str,
    place: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert program.main([argument.replace("PLACE", place) for argument in arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {name} {place}")
    assert lines[0].endswith("/file is no folder: choose another")


@pytest.mark.parametrize("only", [False, True], ids=["pack", "index"])
def test_shards_are_refused(tmp_path: Path, place: str, only: bool) -> None:
    source = str(tmp_path / "none")
    paths, out = ((source,), place) if only else ((source, place), "")
    with pytest.raises(InputError, match=told("OUT", place)):
        pack.main(paths, index_only=only, out=out)


def test_folders_that_are_there_or_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for url in (
        ".",
        "new",
        "new/below",
        "link",
        "link/new/",
        "/",
        f"file://{tmp_path}/x",
        "s3://a",
    ):
        files.check_folder(url, "OUT")
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(InputError, match="broken is no folder"):
        files.check_folder("broken", "OUT")
