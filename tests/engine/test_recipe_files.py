"""Recipe files of one's own: helpers beside them, and errors that say where."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

import engine.method.lars
from engine import recipe_files
from engine.recipe import load, load_file
from shards.errors import InputError
from tests.helpers.places import ROOT

HEAD = "from engine import Recipe, ScheduleConfig\n"


def write(folder: Path, **files: str) -> str:
    """Write mine.py and the modules beside it, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        (folder / f"{name}.py").write_text(source)
    return str(folder / "mine.py")


def test_helpers_of_equal_names_do_not_mix(tmp_path: Path) -> None:
    """Modules and packages; what was there before is there afterwards, and nothing else."""
    found = []
    path, modules = list(sys.path), set(sys.modules)
    for number in (1, 2, 1):
        folder = tmp_path / str(number)
        (folder / "my_package").mkdir(parents=True, exist_ok=True)
        (folder / "my_package" / "__init__.py").write_text("")
        (folder / "my_package" / "rates.py").write_text(f"LR = {number}")
        mine = write(
            folder,
            my_views=f"from my_package.rates import LR\nSEED = {number}",
            mine=f"{HEAD}import my_views\n"
            "recipe = Recipe(seed=my_views.SEED, schedule=ScheduleConfig(base_lr=my_views.LR))",
        )
        recipe = load(mine)
        found.append((recipe.seed, recipe.schedule.base_lr))
    assert found == [(1, 1), (2, 2), (1, 1)]
    assert sys.path == path
    assert not {name for name in sys.modules.keys() - modules if name.startswith("my_")}


def test_a_recipe_at_the_top_of_the_clone_keeps_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its folder holds engine/ too, and a module that came twice would be two of each class."""
    monkeypatch.setattr(engine.method, "lars", engine.method.lars)
    monkeypatch.delitem(sys.modules, "engine.method.lars")
    with recipe_files.running(str(ROOT / "mine.py"), str):
        import_module("engine.method.lars")
    assert "engine.method.lars" in sys.modules


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"mine": "import nothing"}, "mine.py, line 1: ModuleNotFoundError: No module named"),
        ({"mine": "import a", "a": "x = 1\ny = ("}, "a.py, line 2: SyntaxError: '(' was never"),
        ({"mine": "import a", "a": "\n\n1 / 0"}, "a.py, line 3: ZeroDivisionError"),
        (
            {"mine": f"{HEAD}recipe = Recipe(sed=1)"},
            "line 2: Recipe has no field sed: did you mean",
        ),
        (
            {"mine": f"{HEAD}\nScheduleConfig(warmup_epochs=1)"},
            "line 3: ScheduleConfig has no field warmup_epochs: write warmup='10 epochs', because",
        ),
        ({"mine": f"{HEAD}Recipe(epochs=1)"}, "no field epochs: it is one of ScheduleConfig"),
        (
            {"mine": f"{HEAD}Recipe(xyzzy=1)"},
            "Recipe has no field xyzzy: it has run, seed, steps, ",
        ),
        (
            {"mine": "import a", "a": "from engine import ViewConfig\n\nViewConfig(blur=0)"},
            "a.py, line 3: ViewConfig needs 'solarize'",
        ),
        ({"mine": "def f(a): ...\nf(b=1)"}, "line 2: TypeError: f() got an unexpected keyword"),
        ({"mine": f"{HEAD}recipe = Recipe(seed='7')"}, "mine.py: seed takes a whole number, not"),
        ({"mine": f"{HEAD}recipe = Recipe(batch=256)"}, "batch takes a BatchConfig, not 256"),
        (
            {"mine": f"{HEAD}recipe = Recipe(schedule=ScheduleConfig(warmup=0.5))"},
            "schedule.warmup takes a number of steps or of epochs, such as",
        ),
    ],
)
def test_a_mistake_names_its_file_and_line(
    tmp_path: Path, files: dict[str, str], text: str
) -> None:
    with pytest.raises(InputError) as error:
        load(write(tmp_path, **files))
    assert text in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_shipped_recipes_have_bare_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("quickstart").run == "runs/quickstart"
    with pytest.raises(InputError, match=r"quickstar: no such recipe file; .*, imagenette, "):
        load("quickstar")
    with pytest.raises(InputError, match=r"s3://b/mine\.py: a recipe file must be on a local disk"):
        load("s3://user:canary@b/mine.py")


SIZED = (
    HEAD
    + """
def recipe_for(images):
    from rates import LR
    return Recipe(schedule=ScheduleConfig(epochs=1000 / images, base_lr=LR))
recipe = recipe_for(10)
"""
)


def test_a_recipe_may_follow_the_number_of_images(tmp_path: Path) -> None:
    found = load_file(write(tmp_path, mine=SIZED, rates="LR = 3"))
    assert (found.recipe.schedule.epochs, found.recipe.schedule.base_lr) == (100, 3)
    assert found.for_images(500).schedule.epochs == 2
    with pytest.raises(InputError, match=r"mine\.py, line 5: ZeroDivisionError: "):
        found.for_images(0)
    found = load_file(write(tmp_path, mine="from engine import Recipe\nrecipe = Recipe()"))
    assert found.for_images(500) == found.recipe
    source = "from engine import Recipe\nrecipe = Recipe()\ndef recipe_for(images): ..."
    with pytest.raises(InputError, match="recipe_for returns no engine"):
        load_file(write(tmp_path, mine=source)).for_images(500)


@pytest.mark.parametrize(
    ("images", "batch", "epochs"),
    [(2, 2, 1000), (300, 32, 1000), (2000, 128, 1000), (4000, 256, 625), (10**6, 256, 20)],
)
def test_own_images_fit_their_number(images: int, batch: int, epochs: int) -> None:
    recipe = load_file("own_images").for_images(images)
    recipe.check()
    assert (recipe.batch.size, recipe.schedule.epochs) == (batch, epochs)
    assert recipe.batch.size % recipe.data.streams == 0
    assert recipe.probe.every == recipe.checkpoint.every == f"{epochs // 10} epochs"
    assert recipe.schedule.warmup == "5 epochs"  # as runs of earlier releases had it
