"""The script for the first day with a GPU keeps what its parts found; on a CPU all of them run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.gpu_day import note
from tests.helpers.places import ROOT

PARTS = {
    *("draw", "tests", "profile", "largest", "views", "peers", "checkpoint", "step_few"),
    *("step_small", "profile_small", "cifar10"),
}
AT_ONCE = {"compile_r50", "compile_cifar10", "tests"}


def test_each_part_is_kept_with_its_figures(tmp_path: Path) -> None:
    (tmp_path / "views.log").write_text("some line\n=== 3 passed, 2 skipped in 1.5s ===\n")
    rows = {"title": ["it"], "rows": [{"name": "a"}], "failed": []}
    (tmp_path / "views.rows.json").write_text(json.dumps(rows))
    (tmp_path / "hang.log").write_text("begun\n")
    note(tmp_path, "views", 0, 0.0, 60.0, ["python", "a b.py"])
    note(tmp_path, "hang", 137, 0.0, 60.0, ["sleep", "9"])

    document = json.loads((tmp_path / "gpu_day.json").read_text())
    views, hang = document["parts"]["views"], document["parts"]["hang"]
    assert views["command"] == "python 'a b.py'"
    assert (views["exit_code"], views["timed_out"]) == (0, False)
    assert views["figures"]["rows"] == rows["rows"]
    assert views["figures"]["tests"] == "3 passed, 2 skipped in 1.5s"
    assert (hang["exit_code"], hang["timed_out"]) == (137, True)
    assert hang["figures"]["last_lines"] == ["begun"]
    assert {"machine", "versions", "date", "load"} <= document.keys()


def test_the_timeouts_leave_it_25_minutes() -> None:
    script = (ROOT / "tests" / "gpu_day.sh").read_text()
    limits = re.findall(r"^ .*?\b(?:part|bench) (\w+) (\d+) ", script, re.MULTILINE)
    assert PARTS | AT_ONCE | {"step_compiled"} == {name for name, _ in limits}
    seconds = {name: int(limit) for name, limit in limits}
    first = max(seconds.pop(name) for name in AT_ONCE)
    assert first + sum(seconds.values()) <= 1440  # and a minute for what notes them


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs_on_a_cpu(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path), "GPU_DAY_FAST": "1", "PYTHON": sys.executable}
    subprocess.run([str(ROOT / "tests" / "gpu_day.sh")], env=environment, check=True)
    parts = json.loads((tmp_path / "gpu_day.json").read_text())["parts"]
    assert parts.keys() == PARTS
    for name, part in parts.items():
        # Without a GPU no test is chosen that could run, which is no failure of pytest's.
        assert part["exit_code"] == 0, (name, part["figures"]["last_lines"])
    for name in PARTS - {"draw", "tests", "profile", "profile_small", "cifar10"}:
        assert parts[name]["figures"]["rows"], name
    for name in ("profile", "profile_small", "cifar10"):
        assert parts[name]["figures"]["log"], name
    for name in ("profile", "profile_small"):
        assert parts[name]["figures"]["profile"]
