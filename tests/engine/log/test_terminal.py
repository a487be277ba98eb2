"""Standard output that takes nothing more does not end what writes to it."""

import subprocess
import sys

import pytest

from engine.log.terminal import flush_output
from tests.helpers.places import ROOT

PROGRAM = """
import sys
from engine.log.terminal import Terminal, flush_output
terminal = Terminal(True)
for number in range(3000):
    terminal.say(f"a line {number}")
    terminal.report(f"another line {number}")
print("done", file=sys.stderr)
flush_output()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no /dev/full here")
def test_a_full_disk_below_standard_output() -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            check=False,
        )
    assert (found.returncode, found.stderr) == (0, "done\n")


def test_a_closed_output_has_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    flush_output()
