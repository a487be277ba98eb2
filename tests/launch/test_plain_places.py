"""Programs in a checkout that may not be written to, and on terminals that know ASCII only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shards.loader import DataConfig
from tests.helpers import jobs
from tests.helpers.places import ROOT

ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
# Root may write anywhere, unless it gives that up.
AS_USER = ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"]


def call(
    program: str, *arguments: str, root: Path = ROOT, prefix: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(prefix or []), sys.executable, str(root / "launch" / f"{program}.py"), *arguments],
        env=os.environ | ASCII | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "recipes/quickstart.py", "--help"],
        ["pack", "--help"],
        ["evaluate", "linear", "--help"],
        ["export", "--help"],
        ["bench", "--help"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_help_on_a_terminal_that_knows_ascii_only(arguments: list[str]) -> None:
    found = call(*arguments)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.isascii()
    assert "--" in found.stdout


def test_names_that_ascii_does_not_have(tiny_data: DataConfig, tmp_path: Path) -> None:
    """A table that is cut with an ellipsis, and a folder with an umlaut."""
    data, run = str(Path(tiny_data.train).parent), str(tmp_path / "Läufe" / ("x" * 60))
    found = call("train", *jobs.small(data, run, "--no-compile", "--debug-step"))
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.isascii()
    assert "... |" in found.stdout
    trained = call("train", *jobs.small(data, run, "--no-compile", "--steps", "1"))
    assert (trained.returncode, trained.stderr) == (0, "")
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
        for arguments in (
            ["train", *jobs.small(data, run, "--no-compile", "--steps", "2")],
            ["pack", str(photo_folder), str(tmp_path / "packed")],
            ["evaluate", "knn", run],
            ["export", run, str(tmp_path / "exported")],
        ):
            found = call(*arguments, root=checkout, prefix=prefix)
            assert found.returncode == 0, found.stderr
        assert sorted(checkout.rglob("*")) == before
    finally:
        for path in folders:
            path.chmod(0o755)
