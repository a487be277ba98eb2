"""Checkpoints: whole or not there, verified before they are read."""

import json
import pickle
import shutil
import zlib
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from engine.processes.world import World
from engine.state import checkpoint, layout
from shards.errors import InputError
from shards.storage import files

pytestmark = pytest.mark.versions

ALONE = World(0, 1, 1, torch.device("cpu"))


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"online": {"weight": torch.full((300,), value), "count": torch.tensor(int(value))}}


def save(run: Path | str, step: int) -> checkpoint.Commit:
    return checkpoint.save(str(run), step, state(step), {"seed": 0}, "digest", ALONE)


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 3)
    commit = checkpoint.latest(str(tmp_path), ALONE, print)
    assert commit is not None
    assert (commit.step, commit.method, commit.index_digest) == (3, {"seed": 0}, "digest")
    found = state(0)
    checkpoint.load(commit, found, ALONE)
    torch.testing.assert_close(found, state(3))


def test_commit_lists_every_file(tmp_path: Path) -> None:
    commit = save(tmp_path, 3)
    folder = Path(commit.url)
    assert {path.name for path in folder.iterdir()} == {*commit.files, "commit.json"}
    for name, (length, _) in commit.files.items():
        assert (folder / name).stat().st_size == length


def test_without_commit_there_is_no_checkpoint(tmp_path: Path) -> None:
    (Path(save(tmp_path, 3).url) / "commit.json").unlink()
    reports: list[str] = []
    assert checkpoint.latest(str(tmp_path), ALONE, reports.append) is None
    assert "not committed" in reports[0]
    with pytest.raises(InputError, match="no committed checkpoint"):
        checkpoint.find(str(tmp_path), ALONE, reports.append)


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "commit", "seed", "folder", "file"])
def test_damage_is_named_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 3)
    newest = Path(save(tmp_path, 4).url)
    (file,) = newest.glob("*.distcp")
    content = file.read_bytes()
    if damage == "bit":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "gone":
        file.unlink()
    elif damage == "commit":
        (newest / "commit.json").write_text('{"step": 4')
    elif damage == "folder":
        (newest / "commit.json").unlink()
        (newest / "commit.json").mkdir()
    elif damage == "file":
        shutil.rmtree(newest)
        newest.write_text("")
    else:  # still JSON, and of another run
        commit_json = newest / "commit.json"
        commit_json.write_text(commit_json.read_text().replace('"seed": 0', '"seed": 1'))
    reports: list[str] = []
    commit = checkpoint.latest(str(tmp_path), ALONE, reports.append)
    assert commit is not None
    assert commit.step == 3
    (report,) = reports
    assert "step_00000004" in report
    assert ("missing" if damage == "gone" else "damaged") in report


def test_metadata_is_not_unpickled_before_its_crc_matched(tmp_path: Path) -> None:
    """A planted pickle would run code when it is read."""
    commit = save(tmp_path, 3)
    witness = tmp_path / "ran"

    class Planted:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (witness,))

    (Path(commit.url) / ".metadata").write_bytes(pickle.dumps(Planted()))
    assert checkpoint.latest(str(tmp_path), ALONE, lambda _: None) is None
    assert not witness.exists()


def test_save_replaces_what_a_killed_one_left(tmp_path: Path) -> None:
    folder = Path(checkpoint.step_url(str(tmp_path), 3))
    folder.mkdir(parents=True)
    (folder / "__7_0.distcp").write_bytes(b"left over")
    commit = save(tmp_path, 3)
    assert not (folder / "__7_0.distcp").exists()
    assert checkpoint.verify(commit.url, ALONE).step == 3


def test_a_checkpoint_that_its_training_removes_before_it_is_read(tmp_path: Path) -> None:
    commit = save(tmp_path, 3)
    save(tmp_path, 4)
    checkpoint.prune(str(tmp_path), 4, keep=1)
    with pytest.raises(InputError, match=r"was removed while it was read.*take a newer one"):
        checkpoint.load(commit, state(0), ALONE)


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        save(tmp_path, step)
    checkpoint.prune(str(tmp_path), 30, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000002",
        "step_00000030",
    ]


def test_prune_keeps_every_so_many(tmp_path: Path) -> None:
    for step in (10, 15, 20, 25, 30):
        save(tmp_path, step)
    checkpoint.prune(str(tmp_path), 30, keep=1, keep_every=20)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000020", "step_00000030"]


def test_prune_removes_what_a_kill_left_of_earlier_ones(tmp_path: Path) -> None:
    """A kill in a save, or in a removal, which takes the commit first."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (1, 2):
        (Path(checkpoint.step_url(str(tmp_path), step)) / "commit.json").unlink()
    checkpoint.prune(str(tmp_path), 4, keep=2)
    assert checkpoint.steps(str(tmp_path)) == [3, 4]


def test_commits_are_looked_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, 1,000 kept checkpoints in a bucket would take half a minute a save."""
    for step in range(8):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    together, exists = Barrier(4), files.exists

    def look(url: str) -> bool:
        together.wait(timeout=20)
        return exists(url)

    (tmp_path / "checkpoints" / "step_00000005" / "commit.json").touch()
    monkeypatch.setattr(files, "exists", look)
    assert checkpoint.committed_steps(str(tmp_path)) == [5]


def test_steps_of_more_than_eight_digits_are_found_in_order(tmp_path: Path) -> None:
    few, many, most = 99_999_999, 100_000_000, 1_000_000_000
    for step in (many, few, most):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step_0999999999").mkdir()  # a name that no step has
    assert checkpoint.steps(str(tmp_path)) == [few, many, most]
    newest = checkpoint.latest(str(tmp_path), ALONE, print)
    assert newest is not None
    assert newest.step == most
    checkpoint.prune(str(tmp_path), most, keep=2)
    assert checkpoint.committed_steps(str(tmp_path)) == [many, most]
    with pytest.raises(InputError, match="is inside of"):
        layout.check_run(checkpoint.step_url(str(tmp_path), most))


def test_prune_counts_no_checkpoint_that_was_refused(tmp_path: Path) -> None:
    """A damaged one of a later step, which is not overwritten yet, pushes out no good one."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    (file,) = Path(checkpoint.step_url(str(tmp_path), 6)).glob("*.distcp")
    file.write_bytes(b"")
    save(tmp_path, 5)
    checkpoint.prune(str(tmp_path), 5, keep=1)
    commit = checkpoint.latest(str(tmp_path), ALONE, lambda _: None)
    assert commit is not None
    assert commit.step == 5


def test_foreign_metadata_is_skipped(tmp_path: Path) -> None:
    """Also where commit.json was made to fit."""
    save(tmp_path, 3)
    newest = Path(save(tmp_path, 4).url)
    content = pickle.dumps(Path("x"))
    (newest / ".metadata").write_bytes(content)
    document = json.loads((newest / "commit.json").read_text())
    document["files"][".metadata"] = [len(content), zlib.crc32(content)]
    document["digest"] = checkpoint._digest(document)
    (newest / "commit.json").write_text(json.dumps(document))
    reports: list[str] = []
    commit = checkpoint.latest(str(tmp_path), ALONE, reports.append)
    assert commit is not None
    assert commit.step == 3
    assert "which no checkpoint of this engine has" in reports[0]


def test_prune_leaves_alone_what_is_not_a_whole_checkpoint(tmp_path: Path) -> None:
    """A newer save that was cut off must not push out the newest whole one."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(tmp_path, step)
    (folder / "step_00000003" / "commit.json").unlink()
    (folder / "best").mkdir()
    (folder / "zz.txt").write_text("a note")
    checkpoint.prune(str(tmp_path), 3, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == [
        "best",
        "step_00000002",
        "step_00000003",
        "zz.txt",
    ]
    commit = checkpoint.latest(str(tmp_path), ALONE, lambda _: None)
    assert commit is not None
    assert commit.step == 2


def test_a_failed_save_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own exception is none that `except Exception` would catch."""

    def fail(*_: object, **__: object) -> None:
        failures: Any = {1: (OSError("No space left on device"), None)}
        raise CheckpointException("save", failures)

    monkeypatch.setattr(checkpoint, "dcp_save", fail)
    with pytest.raises(OSError, match="step_00000003 could not be written by rank 1: No space"):
        save(tmp_path, 3)
    assert checkpoint.latest(str(tmp_path), ALONE, print) is None


def test_any_fsspec_url() -> None:
    save("memory://bucket/run", 5)
    commit = checkpoint.latest("memory://bucket/run", ALONE, print)
    assert commit is not None
    found = state(0)
    checkpoint.load(commit, found, ALONE)
    torch.testing.assert_close(found, state(5))


def test_commit_is_readable_without_this_package(tmp_path: Path) -> None:
    document = json.loads((Path(save(tmp_path, 3).url) / "commit.json").read_text())
    assert document["format"] == 3
    assert document["packages"]["torch"] == torch.__version__.split("+")[0]
