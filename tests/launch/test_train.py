"""The command itself, as users start it: torchrun in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.log.metrics import TIMINGS
from launch import train
from shards.loader import DataConfig
from tests.helpers.places import ROOT

pytestmark = pytest.mark.versions

QUICKSTART = str(ROOT / "recipes" / "quickstart.py")


def torchrun(*arguments: str, launcher: bool = True) -> subprocess.CompletedProcess[str]:
    """Run launch/train.py with the quickstart recipe; without `launcher`, python alone."""
    start = [sys.executable]
    if launcher:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    return subprocess.run(
        [*start, str(ROOT / "launch" / "train.py"), QUICKSTART, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_quickstart_twice_is_equal_bit_for_bit(tmp_path: Path) -> None:
    """The newcomer's command, cut to 6 small steps, drawing its own data each time.

    Under torchrun and under python alone it is the same.
    """
    records = []
    for name in ("torchrun", "python"):
        data, run = tmp_path / name / "data", tmp_path / name / "run"
        done = torchrun(
            *("--data.train", f"{data}/train", "--data.val", f"{data}/val", "--run-url", str(run)),
            *("--data.draw", "128", "--steps", "6", "--log.every", "1", "--threads", "1"),
            *("--probe.every", "3", "--batch.size", "32"),
            launcher=name == "torchrun",
        )
        assert done.returncode == 0, done.stderr
        assert "kNN of untrained encoder" in done.stdout
        assert "tensorboard --logdir" in done.stdout
        assert "step_00000006" in done.stdout
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        records.append([{k: v for k, v in line.items() if k not in TIMINGS} for line in lines])
    assert [line["step"] for line in records[0]] == list(range(7))
    assert records[0] == records[1]


@pytest.mark.slow
def test_quickstart_learns(tmp_path: Path) -> None:
    """The whole quickstart: 25 points of kNN above the untrained encoder and above raw pixels."""
    done = torchrun(
        *("--data.train", f"{tmp_path}/train", "--data.val", f"{tmp_path}/val"),
        *("--run-url", f"{tmp_path}/run"),
    )
    assert done.returncode == 0, done.stderr
    figures = {
        name: float(line.removeprefix(name).strip("%"))
        for line in map(str.strip, done.stdout.splitlines())
        for name in ("raw pixels", "untrained encoder", "trained encoder")
        if line.startswith(name)
    }
    assert figures["trained encoder"] >= figures["untrained encoder"] + 25
    assert figures["trained encoder"] >= figures["raw pixels"] + 25


def test_user_mistake_is_one_line_and_a_failure(
    tmp_path: Path, tiny_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("--run", str(tmp_path / "run"))
    lost = ("--data.train", str(tmp_path / "none"), "--data.draw", "0")
    done = torchrun(*run, *lost, launcher=False)
    assert done.returncode == 1
    data = ("--data.train", tiny_data.train, "--data.val", tiny_data.val)
    assert train.main([QUICKSTART, *run, *data, "--batch.size", "30"]) == 1
    for told, text in (
        (done.stderr, "no index.json there"),
        (capsys.readouterr().err, "batch.size 30 is not divisible by data.streams 8"),
    ):
        (line,) = told.strip().splitlines()
        assert line.startswith("error: ")
        assert text in line
    assert not (tmp_path / "run").exists()


def test_explain_and_replay(
    tmp_path: Path, tiny_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    common = (
        *("--data.train", tiny_data.train, "--data.val", "", "--run-url", run, "--threads", "1"),
        *("--batch.size", "16", "--probe.every", "0", "--probe.no-baseline", "--log.every", "1"),
    )
    assert train.main([QUICKSTART, *common, "--explain", "--explain-speed", "7"]) == 0
    assert "7 images a second of each process, as given" in capsys.readouterr().out
    assert not Path(run).exists()
    assert train.main([QUICKSTART, *common, "--steps", "2"]) == 0
    done = torchrun(*common, "--replay", "2")
    assert done.returncode == 0, done.stderr
    assert "data: equal" in done.stdout
    assert (Path(run) / "replay" / "step_00000002" / "images.csv").exists()
    assert train.main([QUICKSTART, *common, "--replay", "100000"]) == 1
    assert "error: replay 100000: the run has only" in capsys.readouterr().err
