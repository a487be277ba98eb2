"""A program that is started without standard input, output or error."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

# It writes to a file what its next pipe is, and what the standard files of a program that it starts
# are.
PROGRAM = """
import os, subprocess, sys
from launch.plain_output import prepare_output
prepare_output()
pipe = os.pipe()
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]], check=True)
print(min(pipe) > 2, file=open(sys.argv[2], "a"))
"""
STARTED = """
import os, sys
print([os.readlink(f"/proc/self/fd/{number}") for number in range(3)], file=open(sys.argv[1], "a"))
"""


@pytest.mark.parametrize("closed", [{0, 1, 2}, {0, 2}, {1}, set()], ids=str)
def test_what_was_closed_is_the_null_device(closed: set[int], tmp_path: Path) -> None:
    told = tmp_path / "told"
    redirects = " ".join(f"{number}>&-" for number in closed)
    command = [sys.executable, "-c", PROGRAM, STARTED, str(told)]
    with (tmp_path / "other").open("w+") as other:
        subprocess.run(
            ["bash", "-c", f'"$@" {redirects}', "bash", *command],
            cwd=ROOT,
            stdin=other,
            stdout=other,
            stderr=other,
            check=True,
        )
    files, apart = told.read_text().splitlines()
    expected = ["/dev/null" if number in closed else other.name for number in range(3)]
    assert (files, apart) == (str(expected), "True")
