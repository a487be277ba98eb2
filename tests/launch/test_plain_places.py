"""Programs in a checkout that may not be written to, and on terminals that know ASCII only."""

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import train
from launch.plain_output import prepare_output
from shards.loader import DataConfig
from tests.helpers import jobs
from tests.helpers.places import ROOT

ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
# Root may write anywhere, unless it gives that up.
AS_USER = ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"]

# Runs programs in one process, because each process would import torch anew, and says from where.
ONE_BY_ONE = """
import json, runpy, sys
from pathlib import Path
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(f"launch/{sys.argv[0]}.py", run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
import engine
print(Path(engine.__file__).parents[1])
"""


def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{program}.py"), *arguments],
        env=os.environ | ASCII | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "recipes/quickstart.py", "--help"],
        ["evaluate", "linear", "--help"],
        ["export", "--help"],
        ["bench", "--help"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_help_on_a_terminal_that_knows_ascii_only(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = show_in_ascii(monkeypatch)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(f"launch/{arguments[0]}.py", run_name="__main__")
    assert not stop.value.code
    assert b"--" in screen.getvalue()


def show_in_ascii(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """Give this process a standard output that knows ASCII only, and return what it writes to."""
    screen = io.BytesIO()
    terminal = io.TextIOWrapper(screen, encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    return screen


def test_help_in_a_locale_that_knows_ascii_only() -> None:
    found = call("pack", "--help")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.isascii()
    assert "--" in found.stdout


def test_a_table_that_is_cut_with_an_ellipsis(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = str(Path(tiny_data.train).parent), str(tmp_path / ("x" * 60))
    screen = show_in_ascii(monkeypatch)
    prepare_output()
    assert train.main(jobs.small(data, run, "--no-compile", "--debug-step")) == 0
    assert b"... |" in screen.getvalue()


def test_a_folder_with_an_umlaut(tiny_data: DataConfig, tmp_path: Path) -> None:
    data, run = str(Path(tiny_data.train).parent), str(tmp_path / "Läufe")
    trained = call("train", *jobs.small(data, run, "--no-compile", "--steps", "1"))
    assert (trained.returncode, trained.stderr) == (0, "")
    assert trained.stdout.isascii()
    assert "L\\xe4ufe" in trained.stdout


def test_a_checkout_that_may_not_be_written_to(
    tiny_data: DataConfig, photo_folder: Path, tmp_path: Path
) -> None:
    prefix = [] if os.geteuid() else AS_USER
    if prefix and not shutil.which(prefix[0]):
        pytest.skip("root may write anywhere, and there is no setpriv here")
    checkout = tmp_path / "checkout"
    unwanted = shutil.ignore_patterns("__pycache__", ".*", "tests", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=unwanted)
    folders = [path for path in [checkout, *checkout.rglob("*")] if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    before = sorted(checkout.rglob("*"))
    try:
        touch = [*prefix, "touch", str(checkout / "launch" / "new")]
        if subprocess.run(touch, capture_output=True, check=False).returncode == 0:
            pytest.skip("this user may write anywhere")
        run, data = str(tmp_path / "run"), str(Path(tiny_data.train).parent)
        commands = (
            ["train", *jobs.small(data, run, "--no-compile", "--steps", "2")],
            ["pack", str(photo_folder), str(tmp_path / "packed")],
            ["evaluate", "knn", run],
            ["export", run, str(tmp_path / "exported")],
        )
        found = subprocess.run(
            [*prefix, sys.executable, "-c", ONE_BY_ONE, json.dumps(commands)],
            env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout.endswith(f"{checkout}\n")
        assert Path(tmp_path, "exported", "encoder.safetensors").exists()
        assert sorted(checkout.rglob("*")) == before
    finally:
        for path in folders:
            path.chmod(0o755)
