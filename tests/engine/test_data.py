"""Data sets are checked against the recipe before anything expensive begins."""

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.data import open_data
from engine.evaluation.during_training import ProbeConfig
from engine.explain.report import explain
from engine.log.terminal import Terminal
from engine.processes.world import World
from shards.errors import InputError
from shards.index import Index
from shards.loader import DataConfig
from shards.making import pack
from shards.order import BatchConfig
from shards.storage import files
from tests.conftest import draw_photo
from tests.helpers import tiny
from tests.helpers.training import open_trainer

ALONE = World(0, 1, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("micro", "remedy"),
    [(8, "use --data.streams 2"), (3, "use a --batch.micro that divides batch.size 16")],
)
def test_a_remedy_for_micro_batches_that_do_not_fit(
    tiny_data: DataConfig, tmp_path: Path, micro: int, remedy: str
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path, batch=BatchConfig(size=16, micro=micro))
    with pytest.raises(InputError, match=f"batch.micro {micro} does not divide .*: {remedy}$"):
        open_trainer(recipe)
    if micro == 8:
        mended = dataclasses.replace(recipe, data=dataclasses.replace(tiny_data, streams=2))
        assert open_trainer(mended).step == 0


def write(url: Path, window: list[float] | None) -> Index:
    contents = {f"{c}/{i}.jpg": draw_photo(i, 32, 32) for c in "ab" for i in range(32)}
    images = [pack.Image(path, len(text), "ab".index(path[0])) for path, text in contents.items()]
    plan = pack.plan_shards(
        pack.ImageSet("", images, ["a", "b"]), 10**6, 0, {"window": window} if window else {}
    )
    return pack.write_shards(plan, str(url), lambda image: contents[image.path], threads=1)[0]


@pytest.mark.parametrize(
    ("train", "val", "reports"),
    [
        (None, None, 0),
        ([0.0, 9.0], [0.0, 9.0], 0),
        ([0.0, 9.0], [0.0, 8.0], 1),
        ([0.0, 9.0], None, 1),
    ],
)
def test_other_windows_are_reported(
    tmp_path: Path, train: list[float] | None, val: list[float] | None, reports: int
) -> None:
    places = write(tmp_path / "train", train), write(tmp_path / "val", val)
    data = DataConfig(train=places[0].url, val=places[1].url, streams=4)
    said: list[str] = []
    open_data(tiny.recipe(data, tmp_path / "run"), ALONE, said.append)
    assert (
        len([text for text in said if "packed with other windows ([0.0, 9.0] and" in text])
        == reports
    )


def test_nothing_is_drawn_among_somebodys_images(tmp_path: Path) -> None:
    """Nor would --explain let it pass."""
    (tmp_path / "mine" / "cat").mkdir(parents=True)
    (tmp_path / "mine" / "cat" / "1.jpg").write_bytes(b"")
    data = DataConfig(train=f"{tmp_path}/mine", streams=4, draw=40)
    recipe = tiny.recipe(data, tmp_path / "run")
    for start in (open_trainer, lambda one: explain(one, ALONE, Terminal(True))):
        with pytest.raises(InputError, match=r"no index\.json there; it is a folder of images"):
            start(recipe)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "cat", "1.jpg"]


def test_images_are_drawn_once_where_both_sets_are_one(tmp_path: Path) -> None:
    data = DataConfig(train=f"{tmp_path}/one", val=f"{tmp_path}/one", streams=4, draw=40)
    opened = open_data(tiny.recipe(data, tmp_path / "run"), ALONE, print)
    assert opened.val is not None
    assert (opened.train.samples, opened.val.samples) == (40, 40)


def test_nothing_is_drawn_where_a_url_is_wrong(tiny_data: DataConfig, tmp_path: Path) -> None:
    """Neither beside somebody's own images, nor before a set of the probe is missed."""
    own, there, nothing = write(tmp_path / "own", None).url, tiny_data.val, f"{tmp_path}/nothing"
    draw = DataConfig(train=own, val=nothing, streams=4, draw=40)
    run = tmp_path / "earlier"
    files.write(f"{run}/recipe.json", b"{}")
    files.write(f"{run}/neighbours/step_00000001.png", b"a picture")
    for data, probe, text in (
        (draw, ProbeConfig(), "data.val .*/nothing: no index.json there, and nothing is drawn"),
        (dataclasses.replace(draw, train=nothing, val=own), ProbeConfig(), "data.train .*/nothing"),
        (
            dataclasses.replace(draw, train=nothing, val=""),
            ProbeConfig(every=1, train=there, val=f"{tmp_path}/gone"),
            "probe.val .*/gone: no such folder",
        ),
        (
            dataclasses.replace(draw, train=nothing, val=""),
            ProbeConfig(every=1, train=str(run)),
            "probe.train .*/earlier: no images there but a run's own: give the URL",
        ),
    ):
        with pytest.raises(InputError, match=text):
            open_data(tiny.recipe(data, tmp_path / "run", probe=probe), ALONE, print)
    assert {path.name for path in tmp_path.iterdir()} == {"own", "earlier"}
    # A drawing that was stopped between its two sets goes on.
    data = dataclasses.replace(draw, train=tiny_data.train)
    assert open_data(tiny.recipe(data, tmp_path / "run"), ALONE, print).val is not None


def test_no_baseline_that_nothing_follows(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, probe=ProbeConfig(baseline=True)))
    assert trainer.probe is None
    assert "probe.baseline is not measured: probe.every is 0" in capsys.readouterr().out
