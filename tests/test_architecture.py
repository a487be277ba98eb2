"""The house: who may import whom, how long a file may be, what stands at the top."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # downward only
    "shards": {"shards"},
    "engine": {"shards", "engine"},
    "recipes": {"shards", "engine", "recipes"},
    "launch": {"shards", "engine", "launch"},
}
TOP = {"engine", "recipes", "shards", "tests", "launch", "pyproject.toml", "README.md", "LICENSE"}
SOURCES = [path for package in ALLOWED for path in sorted((ROOT / package).glob("**/*.py"))]


def imported_packages(source: str) -> set[str]:
    """The top-level packages that a module's source imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_detects_an_upward_import() -> None:
    found = imported_packages("def f():\n    from engine.byol import build\nimport launch.train")
    assert found == {"engine", "launch"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = imported_packages(path.read_text()) & ALLOWED.keys()
    assert ours <= ALLOWED[package]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.name != "utils.py"


def test_networks_know_nothing_of_processes() -> None:
    source = (ROOT / "engine" / "byol.py").read_text()
    assert "torch.distributed" not in source.replace("knows nothing of torch.distributed", "")


def test_top_level() -> None:
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listing.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP
