"""A disk that fills up during a run: one line says so, and the last checkpoint stays."""

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.log.metrics import TIMINGS
from engine.state import checkpoint, saver
from engine.state.checkpoint import CheckpointConfig
from shards.loader import DataConfig
from shards.storage import local_files
from tests.helpers import tiny
from tests.helpers.small_disk import resize, small_disk
from tests.helpers.training import finish, train, training


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "BACKOFF", 0.01)


def records(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in found]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_the_last_checkpoint(
    number: int,
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk is full when the end of step 8's checkpoint is synced."""
    sync = local_files.sync

    def full(file: Any) -> None:
        if "step_00000008" in file.name and ".metadata" in file.name:
            raise OSError(number, os.strerror(number))
        sync(file)

    monkeypatch.setattr(local_files, "sync", full)
    how = CheckpointConfig(every=4, keep=1)
    train(tiny.recipe(tiny_data, tmp_path, steps=10, probe=tiny.NO_PROBE, checkpoint=how))
    assert checkpoints(tmp_path) == ["step_00000010"]
    told = capsys.readouterr().out.splitlines()
    line, *more = [line for line in told if line.startswith("the checkpoint of step")]
    assert re.match(r"the checkpoint of step 8 \([\d.]+ [kM]B of tensors\) failed \(1 of 3\)", line)
    assert f"{tmp_path}/checkpoints/step_00000008" in line
    (size,) = re.findall(r"\((.*) of tensors", line)
    assert f"{os.strerror(number)}; the whole checkpoint needs {size}" in line
    assert more == [
        "the checkpoint of step 8 was not saved; training goes on",
        "the checkpoint of step 10 was saved at attempt 1, and the 1 before it were not",
    ]


def test_nothing_of_a_failed_checkpoint_stays(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a checkpoint is written, each of three times."""
    found: list[list[str]] = []
    write, commit = checkpoint.write, checkpoint.commit

    def note(run: str, step: int, *rest: Any) -> Any:
        if step > 4:
            found.append(checkpoints(tmp_path))
        return write(run, step, *rest)

    def full(run: str, step: int, *rest: Any) -> Any:
        if step == 8:
            assert checkpoints(tmp_path) == ["step_00000004", "step_00000008"]
            raise OSError(errno.ENOSPC, "full")
        return commit(run, step, *rest)

    monkeypatch.setattr(checkpoint, "write", note)
    monkeypatch.setattr(checkpoint, "commit", full)
    train(tiny.recipe(tiny_data, tmp_path, steps=9, probe=tiny.NO_PROBE))
    assert found == [["step_00000004"]] * 4


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 1900):
        yield tmp_path / "disk"


def test_a_run_on_a_small_disk_goes_on_when_there_is_room(
    disk: Path, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk takes one checkpoint, and not a second."""
    how = CheckpointConfig(every=4, keep=1)
    text = "the state of step 8 could not be saved, .* continues from the checkpoint of step 4$"
    with pytest.raises(OSError, match=text):
        train(tiny.recipe(tiny_data, disk, steps=8, checkpoint=how))
    told = r"failed \(1 of 3\): .*; the whole checkpoint needs [\d.]+ [kM]B, free [\d.]+ \wB"
    assert re.search(told, capsys.readouterr().out)
    assert checkpoints(disk) == ["step_00000004"]
    resize(disk, 8000)
    train(tiny.recipe(tiny_data, disk, checkpoint=how, steps=10))
    train(tiny.recipe(tiny_data, tmp_path / "twin", checkpoint=how, steps=10))
    assert "resumed at step 4" in capsys.readouterr().out
    assert records(disk) == records(tmp_path / "twin")


def test_a_disk_that_takes_no_checkpoint_is_told_in_few_lines(
    tmp_path: Path, tiny_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    how = CheckpointConfig(every=2, keep=1)
    recipe = tiny.recipe(tiny_data, tmp_path / "disk", checkpoint=how, probe=tiny.NO_PROBE)
    text = r"step 20 could not be saved, .* same command begins anew, because no checkpoint was "
    with small_disk(tmp_path / "disk", 700), pytest.raises(OSError, match=text):
        train(recipe)
    told = capsys.readouterr().out.splitlines()
    first, *more = [line for line in told if line.startswith("the checkpoint of step")]
    assert "step 2 " in first
    assert "No space left on device; the whole checkpoint needs" in first
    assert more == [
        "the checkpoint of step 2 was not saved; training goes on",
        *(
            f"the checkpoint of step {2 * n} was not saved, nor the {n - 1} before it, as above; "
            "training goes on"
            for n in (2, 4, 8)
        ),
    ]


def test_a_log_on_a_full_disk_is_written_when_there_is_room(
    tiny_data: DataConfig, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Something else fills the disk, and frees it before the end."""
    # Without evaluations the report has no pictures, so that there is room for it.
    how = {"checkpoint": CheckpointConfig(every=0), "probe": tiny.NO_PROBE}
    with training(tiny.recipe(tiny_data, disk / "run", steps=12, **how)) as trainer:
        step = trainer.train_step

        def fill(batch: Any) -> Any:
            if trainer.step == 4:
                with pytest.raises(OSError, match="No space"):
                    (disk / "other").write_bytes(bytes(3_000_000))
            if trainer.step == 8:
                (disk / "other").unlink()
            return step(batch)

        trainer.train_step = fill  # type: ignore[method-assign]
        finish(trainer)
    lines = [line for line in capsys.readouterr().out.splitlines() if "No space" in line]
    assert len(lines) == 1
    assert re.match(
        rf"{disk}/run/.*: No space left .* needed at least .*; training goes on, the log is kept",
        lines[0],
    )
    assert [record["step"] for record in records(disk / "run")] == list(range(1, 13))
