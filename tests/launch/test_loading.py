"""What is printed before the imports, which take seconds."""

import gc
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from launch import imports
from launch.loading import say_loading
from tests.helpers.places import ROOT


@pytest.mark.parametrize(
    ("terminal", "rank", "arguments", "said"),
    [
        (True, "0", ["RECIPE"], 1),
        (True, "1", ["RECIPE"], 0),
        (False, "0", ["RECIPE"], 0),
        (True, "0", ["RECIPE", "--help"], 0),
    ],
)
def test_one_line_where_a_person_watches(
    terminal: bool,
    rank: str,
    arguments: list[str],
    said: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setenv("RANK", rank)
    say_loading()
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", said)


@pytest.mark.parametrize("name", ["train", "evaluate", "pack", "export"])
def test_it_comes_before_the_imports(name: str) -> None:
    text = (ROOT / "launch" / f"{name}.py").read_text()
    heavy = "\nimport tyro" if name == "pack" else "\nfrom engine"
    assert text.index("    imports.begin()") < text.index(heavy)


def test_it_is_part_of_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    for name in ("say_loading", "check_requirements", "prepare_output"):
        monkeypatch.setattr(imports, name, partial(begun.append, name))
    imports.begin()
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert begun == ["say_loading", "check_requirements", "prepare_output"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("launch/train.py", ("quickstart", "which field answers which question.\n")),
        ("launch/pack.py", ("--window-percentiles", "\n")),
    ],
)
def test_a_page_of_help_needs_no_torch(command: str, said: tuple[str, str], tmp_path: Path) -> None:
    """A torch that cannot be imported stands in its way, and what imports torch does too."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run(
        [sys.executable, command, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    part, end = said
    assert part in done.stdout
    assert done.stdout.endswith(end)
