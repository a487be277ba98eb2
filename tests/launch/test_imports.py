"""While a command imports, Ctrl-C ends it plainly and no garbage is collected."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import imports
from tests.helpers.places import ROOT

COMMANDS = ["train", "pack", "evaluate", "export", "bench"]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
    gc.unfreeze()
    gc.enable()


def test_what_begins_also_ends() -> None:
    imports.begin()
    assert not gc.isenabled()
    assert signal.getsignal(signal.SIGINT) is imports._end
    imports.end()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000  # torch alone has as many
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_user_who_ignores_interrupts_still_does() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    imports.begin()
    imports.end()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_what_is_kept_is_collected_at_the_exit() -> None:
    """Triton's library counts its objects then, and prints a page when some are left."""
    program = """
from launch import imports
class Kept:
    def __del__(self):
        print("collected")
imports.begin()
kept = Kept()
kept.itself = kept
del kept
imports.end()
print("the end")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["the end", "collected"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_python_without_the_project_is_told(name: str, tmp_path: Path) -> None:
    """-S leaves out what is installed."""
    program = ROOT / "launch" / f"{name}.py"
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-S", str(program), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=bare, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: No module named 'launch': run `. .venv/bin/activate`")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_begins_and_ends(name: str) -> None:
    """A command that never ends it would keep all garbage of its life."""
    text = (ROOT / "launch" / f"{name}.py").read_text()
    begin, main, end = (
        text.index(f"\n{what}")
        for what in ("    imports.begin()", "def main(", "    imports.end()")
    )
    assert begin < main < end
