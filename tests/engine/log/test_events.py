"""Event files: what tensorboard reads of them, wherever they are, whenever their writer dies."""

import io
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.log import events
from engine.log.events import EventLog
from shards.storage import files
from tests.helpers.fault_proxy import FaultProxy


def read(folder: str) -> EventAccumulator:
    """As tensorboard reads the folder when it is started."""
    if folder.startswith("s3://"):  # tensorboard's own client keeps listings
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    return EventAccumulator(folder, size_guidance={"images": 0, "scalars": 0}).Reload()


def points(folder: str, name: str) -> list[tuple[int, float]]:
    if not files.list_names(folder):
        return []
    found = read(folder)
    tags = found.Tags()["scalars"]
    return [(p.step, p.value) for p in found.Scalars(name)] if name in tags else []


def pictures(folder: str) -> list[int]:
    found = read(folder)
    names = found.Tags()["images"]
    return [p.step for name in names for p in found.Images(name)]


def pixels(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/run/tensorboard"
    own = {"local": str(tmp_path), "memory": f"memory://{secrets.token_hex(6)}"}
    return f"{own[request.param]}/run/tensorboard"


def test_scalars_and_pictures_come_back(folder: str) -> None:
    log = EventLog(folder, 0)
    log.scalars({"loss": 0.5, "lr": 0.25}, 10)
    log.picture("views", pixels(0), 10)
    log.flush()
    log.scalars({"loss": float("nan"), "lr": 0.125}, 20)
    log.flush()
    found = read(folder)
    assert sorted(found.Tags()["scalars"]) == ["loss", "lr"]
    assert [(p.step, p.value) for p in found.Scalars("lr")] == [(10, 0.25), (20, 0.125)]
    assert [p.step for p in found.Scalars("loss")] == [10, 20]
    (picture,) = found.Images("views")
    assert (picture.step, picture.width, picture.height) == (10, 9, 6)
    decoded = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    np.testing.assert_array_equal(decoded, pixels(0))


def test_killed_and_resumed(folder: str) -> None:
    """Each point once and in order, though the first process had come further."""
    first = EventLog(folder, 0)
    for step in range(1, 8):
        first.scalars({"loss": step}, step)
        first.picture("views", pixels(step), step)
        if step in (2, 3, 6):
            first.flush()
    assert points(folder, "loss") == [(s, s) for s in range(1, 7)]  # a kill takes step 7
    second = EventLog(folder, 4)
    for step in range(5, 8):
        second.scalars({"loss": -step}, step)
        second.picture("views", pixels(step), step)
        second.flush()
    assert points(folder, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, -5), (6, -6), (7, -7)]
    assert pictures(folder) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("left", [0.5, 0.9, 0.0])
def test_a_file_that_was_cut_loses_no_point(tmp_path: Path, left: float) -> None:
    """A power cut may take the end of a growing file, whose points metrics.jsonl still has."""
    first = EventLog(str(tmp_path), 0)
    for step in range(1, 9):
        first.scalars({"loss": step}, step)
    first.flush()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    second = EventLog(str(tmp_path), 8)
    assert second.reached < 8
    for step in range(second.reached + 1, 9):  # as MetricsLog does
        second.scalars({"loss": step}, step)
    second.flush()
    assert EventLog(str(tmp_path), 8).reached == 8
    assert sorted(set(points(str(tmp_path), "loss"))) == [(s, s) for s in range(1, 9)]


def test_files_of_a_restart_come_last_though_its_clock_is_behind(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for start, clock in ((0, 2_000_000_000.0), (2, 1_700_000_000.0), (2, 1_600_000_000.0)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        log = EventLog(folder, start)
        for step in range(start + 1, 5):
            log.scalars({"loss": clock}, step)
            log.flush()
    assert points(folder, "loss") == [
        *((step, 2_000_000_000.0) for step in (1, 2)),
        *((step, 1_600_000_000.0) for step in (3, 4)),
    ]


def test_tensorboard_follows_a_run(folder: str) -> None:
    if folder.startswith("s3://"):
        pytest.skip("needs settings of tensorboard's client: see the README")
    log = EventLog(folder, 0)
    log.scalars({"loss": 1}, 1)
    log.flush()
    follower = read(folder)
    for step in (2, 3):
        log.scalars({"loss": step}, step)
        log.flush()
        assert [p.step for p in follower.Reload().Scalars("loss")] == list(range(1, step + 1))


def test_nothing_logged_nothing_written(folder: str) -> None:
    log = EventLog(folder, 0)
    log.scalars({}, 1)
    log.flush()
    assert files.list_names(folder) == []


def test_one_file_on_a_disk_and_parts_elsewhere(folder: str) -> None:
    log = EventLog(folder, 0)
    for step in (7, 8, 12):
        log.scalars({"loss": 0.5}, step)
        log.flush()
    names = files.list_names(folder)
    if files.is_local(folder):
        assert len(names) == 1
    else:
        assert [name[-20:] for name in names] == [
            "000000-00000007.byol",
            "000001-00000008.byol",
            "000002-00000012.byol",
        ]


def test_what_earlier_processes_have_written(folder: str) -> None:
    """So that the rest can be had from metrics.jsonl."""
    log = EventLog(folder, 5)
    assert log.reached == 0
    log.scalars({"loss": 0.5}, 3)
    log.flush()
    log.picture("views", pixels(0), 8)
    log.flush()
    log.scalars({"loss": 0.5}, 6)  # never written
    assert log.reached == 6
    assert EventLog(folder, 2).reached == 2
    # A file that grows has all points before its last event.
    assert EventLog(folder, 9).reached == (7 if files.is_local(folder) else 3)
    log.scalars({"loss": 0.5}, 100_000_000)  # a step of more digits than names have at least
    log.flush()
    assert EventLog(folder, 10**9).reached == 10**8


def test_what_no_other_process_could_write_again() -> None:
    log = EventLog(f"memory://{secrets.token_hex(6)}", 0)
    log.scalars({"loss": 0.5}, 1)
    assert not log.unrepeatable
    log.scalars({"knn_top1": 0.5}, 1)  # the line of step 1 may have been in a file before
    assert log.unrepeatable
    log.flush()
    assert not log.unrepeatable
    log.picture("views", pixels(0), 1)
    assert log.unrepeatable


# Outages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrives", [False, True])
def test_events_outlast_an_outage(monkeypatch: pytest.MonkeyPatch, arrives: bool) -> None:
    """Once each, also when only the store's answer got lost."""
    folder = f"memory://{secrets.token_hex(6)}"
    write = files.write

    def fail(url: str, content: bytes) -> None:
        if arrives:
            write(url, content)
        raise OSError("gave up")

    log = EventLog(folder, 0)
    log.scalars({"loss": 1}, 1)
    log.flush()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", fail)
        for step in (2, 3):
            log.scalars({"loss": step}, step)
            with pytest.raises(OSError, match="gave up"):
                log.flush()
    assert log.unwritten == 2
    log.flush()
    assert log.unwritten == 0
    assert points(folder, "loss") == [(1, 1), (2, 2), (3, 3)]


def test_a_full_disk_leaves_no_half_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensorboard would read nothing behind it."""
    log = EventLog(str(tmp_path), 0)

    def half(path: str, mode: str) -> Any:
        with Path(path).open("wb" if mode == "wb" else "ab") as file:
            file.write(b"\x18" + b"\0" * 2000)
        raise OSError("No space left on device")

    for step in (1, 2, 3):
        log.scalars({"loss": step}, step)
        with monkeypatch.context() as patch:
            patch.setattr(events, "open", half, raising=False)
            with pytest.raises(OSError, match="No space"):
                log.flush()
        log.flush()
    assert points(str(tmp_path), "loss") == [(1, 1), (2, 2), (3, 3)]
    sound = EventLog(str(tmp_path / "sound"), 0)
    for step in (1, 2, 3):
        sound.scalars({"loss": step}, step)
    sound.flush()
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.byol")]
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]


# Requests and libraries --------------------------------------------------------------------------


def test_no_object_is_written_twice_or_read(s3: str, proxy: FaultProxy) -> None:
    for start in (0, 2, 2):
        log = EventLog(f"{s3}/run", start)
        asked = len(proxy.log)
        for step in range(start + 1, start + 6):
            log.scalars({"loss": 0.5}, step)
            log.picture("views", pixels(step), step)
            log.flush()
        requests = proxy.log[asked:]
        assert [request.method for request in requests] == ["PUT"] * 5
    puts = [request.path for request in proxy.log if request.method == "PUT"]
    assert len(set(puts)) == len(puts) == 15


_WRITE = """
import sys, types
boto3 = types.ModuleType("boto3") if sys.argv[2] == "unusable" else None
sys.modules["boto3"] = boto3
from engine.log.events import EventLog
log = EventLog(sys.argv[1], 0)
log.scalars({"loss": 0.5}, 1)
log.flush()
log.scalars({"loss": 0.25}, 2)
log.flush()
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("boto3", ["missing", "unusable"])
def test_written_without_boto3(s3: str, boto3: str) -> None:
    """Tensorboard itself writes s3:// with it, and otherwise without it; this does neither."""
    folder = f"{s3}/run"
    subprocess.run([sys.executable, "-c", _WRITE, folder, boto3], check=True, timeout=120)
    assert points(folder, "loss") == [(1, 0.5), (2, 0.25)]
