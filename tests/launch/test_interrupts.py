"""Ctrl-C while a command imports its libraries ends it with one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

# A library whose import takes long, in the place of one that all commands import.
SLOW = """
import time
print('importing', flush=True)
for _ in range(600):  # Python 3.14 may enter one long sleep with a signal that came just before
    time.sleep(0.1)
"""


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "pack", "bench"])
def test_during_the_imports(command: str, tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text(SLOW)
    (tmp_path / "tyro.py").write_text(SLOW)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", f"import runpy; runpy.run_module('launch.{command}', "
        "run_name='__main__', alter_sys=True)"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert told == "interrupted: the same command begins again\n"
    assert process.returncode == 130
