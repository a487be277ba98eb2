"""Stores that refuse to delete: nothing stops, nothing comes back, and it is told once."""

import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.log import journal
from engine.log.journal import Journal, add, read
from engine.log.metrics import TIMINGS
from engine.state import checkpoint
from engine.trainer import Trainer
from launch import export
from shards import index as indexes
from shards.errors import InputError
from shards.loader import DataConfig
from shards.making import pack
from shards.storage import files, local_files
from tests.conftest import Files
from tests.engine.log.test_events import points
from tests.engine.log.test_journal import fail, parts, record, records
from tests.engine.state.test_checkpoint import ALONE
from tests.helpers import tiny
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.training import finish, open_trainer, train

DELETES = r"^DELETE |^POST .*[?&]delete"
BULK_DELETES = r"^POST .*[?&]delete"
TOLD = "old objects stay there, because they can't be removed"


@pytest.fixture
def memory(tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}/run"


def test_parts_that_cannot_be_removed(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They say nothing from then on, are told of once, and are not tried again by this writer."""
    told: list[str] = []
    log = Journal(memory, 0, cache(told.append))
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", fail)
        for step in (1, 2):
            log.write(record(step))
            log.flush()
            log.compact()
        assert log.unwritten == 0
        assert read(memory) == records(1, 2)
        assert len(parts(memory)) == 2
        assert told == [f"{memory}: {TOLD} (gave up)"]
        # A restart at an earlier step: what the parts said of later ones does not come back.
        log = Journal(memory, 1, cache(told.append))
        assert read(memory) == records(1)
        add(memory, record(1, knn_top1=0.5))
        log.write(record(2, knn_top1=0.7))
        log.compact()
        assert read(memory) == [record(1, knn_top1=0.5), record(2, knn_top1=0.7)]
        Journal(memory, 0, cache(told.append))
        assert read(memory) == []
    assert len(parts(memory)) == 3


def test_many_parts_that_cannot_be_removed_are_told_of_once(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads remove them, and a report that tells everything once cannot hold them apart."""
    told: list[str] = []
    log = Journal(memory, 0, told.append)
    for step in range(1, 9):
        log.write(record(step))
        log.flush()
    monkeypatch.setattr(files, "remove", fail)
    log.compact()
    assert len(parts(memory)) == 8
    assert len(told) == 1


def test_nor_be_emptied(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Journal(memory, 0)
    log.write(record(1))
    log.flush()
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", fail)
        patch.setattr(files, "write", fail)
        with pytest.raises(OSError, match="gave up"):
            log.compact()
    assert read(memory) == records(1)
    log.compact()
    assert not parts(memory)


def test_causes_do_not_differ_by_how_long_it_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    for seconds in (5, 9):

        def busy(url: str, tried: int = seconds) -> None:
            raise OSError(
                f"{url}: gave up after 8 tries in {tried} s: it is busy (Conflict): {url}"
            )

        monkeypatch.setattr(files, "remove", busy)
        assert not files.discard(f"memory://run/{seconds}", "memory://run", told.append)
    assert told[0] == told[1]
    assert told[0].endswith("(it is busy (Conflict))")


@pytest.mark.parametrize("root", ["/", "file:///", "BUCKET", "BUCKET/"])
def test_a_whole_disk_or_bucket_is_never_removed(
    root: str, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_files, "remove", lambda _: pytest.fail("it was about to be"))
    files.write(f"{s3}/object", b"1")
    with pytest.raises(InputError, match="is never removed"):
        files.remove(root.replace("BUCKET", s3))
    assert files.read(f"{s3}/object") == b"1"


# Whole runs --------------------------------------------------------------------------------------


class Killed(Exception):
    """As if by SIGKILL, for what a test looks at."""


def wait_for_checkpoint(run: str, step: int) -> None:
    """Wait until the checkpoint of `step`, which is saved in the background, is committed."""
    deadline = time.monotonic() + 100
    while not files.exists(files.join(checkpoint.step_url(run, step), checkpoint.COMMIT)):
        assert time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.05)


def killed_at(trainer: Trainer, step: int, last: int) -> None:
    """Train until `step` is logged and the checkpoint of step `last` is there, and no further."""
    take = trainer.train_step

    def step_or_die(batch: Any) -> Any:
        if trainer.step == step:
            wait_for_checkpoint(trainer.run.url, last)
            raise Killed
        return take(batch)

    trainer.train_step = step_or_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        finish(trainer)


def without_timing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line and event goes to the store at once, in a part of its own."""
    monkeypatch.setattr(journal, "pause", lambda _: 0)
    monkeypatch.setattr("engine.log.events.pause", lambda _: 0)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("denied", [DELETES, BULK_DELETES], ids=["all deletes", "bulk deletes"])
def test_a_run_goes_on_and_ends_as_any(
    denied: str,
    proxy: FaultProxy,
    s3: str,
    tiny_data: DataConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxy.deny(denied)
    config = checkpoint.CheckpointConfig(every=3, keep=1)
    recipe = tiny.recipe(tiny_data, f"{s3}/run", checkpoint=config, steps=11)
    killed_at(open_trainer(recipe), 8, last=6)
    first = capsys.readouterr().out
    trainer = open_trainer(recipe)
    assert trainer.step == 6
    finish(trainer)
    second = capsys.readouterr().out

    alone = tiny.recipe(tiny_data, tmp_path / "run", checkpoint=config, steps=11)
    train(alone)
    expected = without_timing(read(alone.run))
    assert [line["step"] for line in expected] == [*range(1, 12)]
    assert without_timing(read(recipe.run)) == expected
    assert [step for step, _ in points(recipe.run, "train/loss")] == [*range(1, 12)]
    # What a reader that was not told of parts would take for the log.
    proxy.deny("")
    assert without_timing(read(recipe.run)) == expected
    assert checkpoint.steps(recipe.run) == ([3, 6, 9, 11] if denied == DELETES else [11])
    for told in (first, second):
        assert told.count(TOLD) == (denied == DELETES)
    assert bool(parts(recipe.run)) == (denied == DELETES)


def test_a_checkpoint_that_cannot_be_removed_stays_whole(
    proxy: FaultProxy, s3: str, tiny_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tensors are left alone where its commit may not be removed."""
    config = checkpoint.CheckpointConfig(every=1, keep=1)
    recipe = tiny.recipe(tiny_data, f"{s3}/run", checkpoint=config, steps=3, probe=tiny.NO_PROBE)
    proxy.deny(r"^DELETE .*commit\.json")
    train(recipe)
    assert capsys.readouterr().out.count(TOLD) == 1
    assert checkpoint.steps(recipe.run) == [1, 2, 3]
    for step in (1, 2, 3):
        checkpoint.verify(checkpoint.step_url(recipe.run, step), ALONE)


def test_an_export_empties_what_cannot_be_removed_of_other_weights(
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = str(tmp_path / "run"), tmp_path / "out"
    train(tiny.recipe(tiny_data, run, steps=1, probe=tiny.NO_PROBE))
    first = ["--format", "torchscript", "state-dict"]
    assert export.main([run, str(out), *first]) == 0
    assert (out / "encoder.ts").stat().st_size > 0
    monkeypatch.setattr(files, "remove", fail)
    capsys.readouterr()
    other = ["--network", "target", "--overwrite"]
    assert export.main([run, str(out), "--format", "safetensors", *other]) == 0
    assert capsys.readouterr().out.count(TOLD) == 1
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert sizes["encoder.ts"] == sizes["encoder.pth"] == 0
    assert sizes["encoder.safetensors"] > 0
    assert sizes["card.json"] > 0


def test_a_packed_set_that_cannot_be_removed_is_replaced(
    proxy: FaultProxy, s3: str, photos: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [pack.Image(path, len(content), -1) for path, content in sorted(photos.items())]
    proxy.deny(DELETES)

    def write(seed: int, overwrite: bool = False) -> tuple[indexes.Index, bool]:
        plan = pack.plan_shards(pack.ImageSet("", images, []), 50_000, seed)
        read = photos.__getitem__
        return pack.write_shards(
            plan, f"{s3}/set", lambda image: read(image.path), threads=2, overwrite=overwrite
        )

    before, _ = write(0)
    assert capsys.readouterr().out.count(TOLD) == 1  # what was needed to go on with it
    kept = {name: files.read(f"{s3}/set/{name}") for name, _ in files.walk(f"{s3}/set")}
    with pytest.raises(InputError, match="--overwrite"):
        write(1)
    proxy.deny(f"{DELETES}|^PUT ")
    with pytest.raises(PermissionError, match=r"^s3://.*/set/index\.json: access denied"):
        write(1, overwrite=True)
    after = {name: files.read(f"{s3}/set/{name}") for name, _ in files.walk(f"{s3}/set")}
    assert after == kept
    assert indexes.load(f"{s3}/set", "data.train").digest == before.digest

    capsys.readouterr()
    proxy.deny(f"{DELETES}|^PUT .*000001")  # it is stopped on the way
    with pytest.raises(PermissionError):
        write(1, overwrite=True)
    assert files.read(f"{s3}/set/index.json") == b""
    proxy.deny(DELETES)
    with pytest.raises(InputError, match="holds other shards, unfinished"):
        write(2)
    capsys.readouterr()
    changed, _ = write(1, overwrite=True)
    assert capsys.readouterr().out.count(TOLD) == 1
    assert changed.plan != before.plan
    assert indexes.load(f"{s3}/set", "data.train").digest == changed.digest
    proxy.deny("")
    write(0, overwrite=True)
    assert ".pack" not in files.list_names(f"{s3}/set")
