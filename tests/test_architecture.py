"""The house: who may import whom, how long a file may be, what stands at the top."""

import ast
import subprocess

import pytest

import engine
from tests.helpers.imports import allowed, arrows, cycle, modules
from tests.helpers.places import ROOT

TOP = {"engine", "recipes", "shards", "tests", "launch", "pyproject.toml", "README.md", "LICENSE"}
MODULES = modules()


def test_modules_are_found() -> None:
    known = {"engine.trainer", "engine.method.byol", "shards.storage.files", "launch.train"}
    assert known | {"recipes.quickstart", "launch.benchmarks.step"} <= MODULES.keys()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from engine import run", {"engine.run"}),
        ("def f():\n    from engine.method.byol import build, no_module", {"engine.method.byol"}),
        ("import engine.trainer as t\nimport torch", {"engine.trainer"}),
        ("from shards.making import pack, scan", {"shards.making.pack", "shards.making.scan"}),
        ("from shards.storage.files import read", {"shards.storage.files"}),
    ],
)
def test_arrows_are_seen(source: str, found: set[str]) -> None:
    assert arrows(source, MODULES) == found


@pytest.mark.parametrize(
    ("module", "below", "may"),
    [
        ("engine.trainer", "engine.run", True),
        ("engine.run", "engine.trainer", False),
        ("engine.run", "engine.data", False),  # beside each other
        ("engine.state.checkpoint", "engine.log.journal", True),
        ("engine.log.journal", "engine.state.layout", False),
        ("engine.log.journal", "engine.processes.world", False),
        ("engine.method.byol", "engine.method.norm", True),
        ("engine.method.byol", "engine.processes.world", False),
        ("shards.index", "engine.recipe", False),
        ("shards.order", "shards.index", True),
        ("shards.storage.files", "shards.index", False),
        ("shards.errors", "shards.storage.files", False),
        ("engine.recipe", "recipes.quickstart", False),
        ("launch.train", "engine.fit", True),
        ("launch.train", "recipes.quickstart", False),
        ("recipes.cifar10_cpu", "recipes.cifar10", True),
    ],
)
def test_the_order_is_as_designed(module: str, below: str, may: bool) -> None:
    assert allowed(module, below) == may


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name: str) -> None:
    for below in arrows(MODULES[name].read_text(), MODULES):
        assert allowed(name, below), f"{name} -> {below}"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("recipes.")])
def test_only_recipes_take_what_the_engine_exports(name: str) -> None:
    """`from engine import Trainer` would hide from where a module imports."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "engine":
            assert not {alias.name for alias in node.names} & engine._PLACES.keys()


def test_no_imports_in_a_circle() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({name: arrows(path.read_text(), MODULES) for name, path in MODULES.items()}) == []


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= 400
    assert not name.endswith(".utils")


def code_lines(function: ast.FunctionDef) -> int:
    """The lines of a function, but for its docstring, which may be the text of a --help page."""
    docs = function.body[0] if ast.get_docstring(function) else None
    return _lines(function) - (_lines(docs) if docs else 0)


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_lines_are_counted() -> None:
    (function,) = ast.parse('def f():\n    """One.\n\n    Two."""\n    a = 1\n    return a').body
    assert isinstance(function, ast.FunctionDef)
    assert code_lines(function) == 3


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_short(name: str) -> None:
    most = 50 if name == "engine.fit" else 60
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node) <= most, node.name


def test_the_method_knows_nothing_of_the_launcher() -> None:
    for name, path in MODULES.items():
        if name.startswith("engine.method."):
            assert "os.environ" not in path.read_text()


def test_top_level() -> None:
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listing.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP
