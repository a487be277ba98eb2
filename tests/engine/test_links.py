"""Links, pipes and files at wrong places of a run: nothing beside it is lost, and nothing hangs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.encoder.foreign_files import read_tensors
from engine.log import journal
from engine.processes.world import World
from engine.run import claim
from engine.state import checkpoint, layout, lease
from engine.state.artefacts import Artefacts
from engine.state.checkpoint import Commit
from shards import index
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.helpers import tiny
from tests.helpers.confined import call_within

ALONE = World(0, 1, 1, torch.device("cpu"))


def save(run: Path, step: int) -> Commit:
    return checkpoint.save(str(run), step, {"a": torch.ones(2)}, {}, "digest", ALONE)


@pytest.mark.parametrize("name", layout.NAMES)
def test_a_run_whose_parts_are_links_is_refused(
    tiny_data: DataConfig, tmp_path: Path, name: str
) -> None:
    from engine.log.terminal import Terminal

    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    (run / name).symlink_to(other / name)
    recipe = tiny.recipe(tiny_data, run, steps=1)
    text = f"^{run}/{name} is a link to {other}/{name}, out of the run: .* or give --run-url where"
    with pytest.raises(InputError, match=text), claim(recipe, "digest", ALONE, Terminal(True)):
        pass
    assert not list(other.iterdir())


def test_a_link_inside_the_run_and_to_the_run_is_none_out_of_it(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    from engine.log.terminal import Terminal

    run = tmp_path / "run"
    (run / "large").mkdir(parents=True)
    (run / "checkpoints").symlink_to("large")
    (tmp_path / "link").symlink_to(run)
    recipe = tiny.recipe(tiny_data, tmp_path / "link", steps=1)
    with claim(recipe, "digest", ALONE, Terminal(True)):
        for step in (1, 2):
            save(tmp_path / "link", step)
        checkpoint.prune(str(tmp_path / "link"), 2, keep=1)
    assert [path.name for path in (run / "large").iterdir()] == ["step_00000002"]


FILES = (layout.RECIPE, layout.JSONL, layout.TRACKERS)


@pytest.mark.parametrize("name", ["", *layout.NAMES])
def test_a_file_where_a_run_has_a_folder_is_refused(
    tiny_data: DataConfig, tmp_path: Path, name: str
) -> None:
    """Behind a file in place of its checkpoints, a run would begin anew."""
    from engine.log.terminal import Terminal

    place = tmp_path / "run" / name
    place.parent.mkdir(exist_ok=True)
    place.mkdir(parents=True) if name in FILES else place.touch()
    recipe = tiny.recipe(tiny_data, tmp_path / "run", steps=1)
    kinds = ("a folder", "a file") if name in FILES else ("no folder", "a folder")
    text = f"{place}: is {kinds[0]}, and a run has {kinds[1]} there: move it away, or give another"
    with pytest.raises(InputError, match=text), claim(recipe, "digest", ALONE, Terminal(True)):
        pass


@pytest.mark.parametrize("linked", ["checkpoints", "checkpoints/step_00000001"])
def test_pruning_follows_no_link(tmp_path: Path, linked: str) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (1, 2, 3):
        save(other, step)
    (run / linked).parent.mkdir(parents=True)
    (run / linked).symlink_to(other / linked)
    if linked.endswith("1"):
        save(run, 2)
    told: list[str] = []
    checkpoint.prune(str(run), 3, keep=1, report=told.append)
    for step in (1, 2, 3):
        assert checkpoint.verify(checkpoint.step_url(str(other), step), ALONE).step == step
    assert "is not removed, because a link leads out of" in told[0]


def test_a_linked_step_is_replaced_and_not_followed(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    before = Path(save(other, 1).url)
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step_00000001").symlink_to(before)
    names = sorted(path.name for path in before.iterdir())
    save(run, 1)
    assert sorted(path.name for path in before.iterdir()) == names
    assert not (run / "checkpoints" / "step_00000001").is_symlink()


def _pipe(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return str(path)


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: files.read(_pipe(folder / "pipe")),
        lambda folder: files.open_reader(_pipe(folder / "pipe")),
        lambda folder: read_tensors(_pipe(folder / "pipe")),
        lambda folder: index.load(str(Path(_pipe(folder / "index.json")).parent), "data.train"),
        lambda folder: journal.read(str(Path(_pipe(folder / "metrics.jsonl")).parent)),
        lambda folder: layout.read_recipe(str(Path(_pipe(folder / "recipe.json")).parent)),
        lambda folder: checkpoint.verify(
            str(Path(_pipe(folder / "step_00000001" / "commit.json")).parent), ALONE
        ),
    ],
)
def test_a_pipe_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Whoever opened it would wait for ever."""
    with pytest.raises(InputError, match="is a pipe, a device or a socket: give a file"):
        call_within(20, lambda: read(tmp_path))


def test_a_device_is_refused() -> None:
    """Whoever read it would need all memory."""
    with pytest.raises(InputError, match=r"^/dev/zero: is a pipe, a device"):
        call_within(20, lambda: read_tensors("/dev/zero"))


def test_a_pipe_among_artefacts_and_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefacts = Artefacts(str(tmp_path / "compile"), {}, "ddp", False, ALONE)
    _pipe(Path(artefacts._digest_url))
    told: list[str] = []
    call_within(20, lambda: artefacts.load(told.append))
    assert "could not be read" in told[0]
    _pipe(tmp_path / "run" / "lease" / "00000001.json")
    monkeypatch.setattr("time.sleep", lambda _: None)
    held = call_within(20, lambda: lease.acquire(str(tmp_path / "run"), [], 10, told.append))
    held.release()
