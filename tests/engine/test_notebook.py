"""Training from Python: the page of the README as it stands there, and what it may not do."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine import open_session
from engine.evaluation.during_training import ProbeConfig
from engine.method.schedule import ScheduleConfig
from engine.notebook import fields_in_messages
from engine.recipe import Recipe, load
from shards.errors import InputError
from shards.loader import DataConfig
from shards.making import synthetic
from tests.helpers import tiny
from tests.helpers.places import ROOT
from tests.helpers.training import open_trainer, train

PAGE = (ROOT / "engine" / "README.md").read_text().partition("## From Python")[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.partition("\n## ")[0], re.DOTALL | re.MULTILINE)


@pytest.fixture
def recipe(tiny_data: DataConfig, tmp_path: Path) -> Recipe:
    return tiny.recipe(tiny_data, tmp_path / "run")


def test_the_page_works_as_it_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block after block, on less data than the quickstart draws."""
    monkeypatch.chdir(tmp_path)
    for name, samples in (("train", 256), ("val", 64)):
        synthetic.write(f"data/quickstart/{name}", samples, 32, seed=0)
    assert len(BLOCKS) >= 4
    names: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for block in BLOCKS:
            exec(block, names)
            if "session" in names:
                stack.callback(names["session"].close)
        session = names["session"]
        assert session.trainer.step == 10
        assert capsys.readouterr().out.count("loss") == 10
        assert names["picture"].dtype == torch.uint8
        assert (tmp_path / "views.png").exists()
        assert names["features"].shape == (64, 128)
        assert names["logits"].shape == (64, 8)
    assert not (tmp_path / "runs").exists()


def test_a_session_takes_the_steps_of_a_training(recipe: Recipe) -> None:
    """Bit for bit, and views, images and features in between change nothing."""
    train(replace(recipe, steps=3))
    expected = open_trainer(recipe)
    fresh = replace(recipe, run=f"{recipe.run}-fresh")
    with open_session(fresh) as session:
        for _ in range(3):
            session.views(2)
            record = session.step()
            session.features(session.images(8).images)
        assert (session.trainer.step, record["step"], expected.step) == (3, 3, 3)
        for name, value in expected.state()["online"].items():
            assert torch.equal(value, session.trainer.online.state_dict()[name]), name
    assert not Path(fresh.run).exists()


def test_a_run_is_continued_only_when_asked(recipe: Recipe) -> None:
    train(replace(recipe, steps=4))
    before = {path: path.read_bytes() for path in Path(recipe.run).rglob("*") if path.is_file()}
    for continue_run, step in ((False, 0), (True, 4)):
        with open_session(recipe, continue_run=continue_run) as session:
            assert session.trainer.step == step
            session.step()
    after = {path: path.read_bytes() for path in Path(recipe.run).rglob("*") if path.is_file()}
    assert before == after


def test_features_are_those_of_an_evaluation(recipe: Recipe) -> None:
    with open_session(recipe) as session:
        session.step()
        images = session.images(1000)
        features = session.features(images.images)
        probe = session.trainer.probe
        assert probe is not None
        expected = probe.extract(probe.val)
        assert torch.equal(images.ids, expected.ids)
        torch.testing.assert_close(features, expected.features)
        top1 = (session.logits(features).argmax(1) == images.labels).float().mean().item()
        assert top1 == pytest.approx(probe.evaluate()["online_top1"])
        assert session.trainer.online.training
        assert len(session.images(5, "train").ids) == 5


def test_views_are_those_that_are_trained_on(recipe: Recipe) -> None:
    with open_session(recipe) as session:
        picture = session.views(3)
        assert picture.shape == (3, 2 * 34 + 2, 3 * 34 + 2)
        assert torch.equal(picture, session.views(3))  # the batch is not used up
        seen = session._peek()
        session.trainer.train_step(seen)
        assert session.trainer.step == 1
        assert not torch.equal(picture, session.views(3))
        assert session.views(1000).shape[2] == 16 * 34 + 2


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 32, 32), torch.uint8), ((2, 3, 32, 32), torch.float32)]
)
def test_wrong_images_are_told(recipe: Recipe, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with open_session(recipe) as session, pytest.raises(InputError, match=r"images must be uint8"):
        session.features(torch.zeros(shape, dtype=dtype))


def test_wrong_types_are_told(recipe: Recipe) -> None:
    """Nothing of another type gets as far as a traceback, or is taken for something else."""
    wrong: Any
    for wrong in (None, "quickstart", {"seed": 1}):
        with pytest.raises(InputError, match=r"recipe takes an engine\.Recipe, not"):
            open_session(wrong)
    wrong = "no"
    with pytest.raises(InputError, match="compile takes True or False, not 'no'"):
        open_session(recipe, compile=wrong)
    wrong = 3
    with pytest.raises(InputError, match="a recipe file is named by a text or a Path, not 3"):
        load(wrong)
    with open_session(recipe) as session:
        images = session.images(2)
        features = session.features(images.images)
        for method in (session.views, session.images):
            for wrong in (0, -1, 2.5, "3", None):
                with pytest.raises(InputError, match="count must be a whole number of at least 1"):
                    method(wrong)
        wrong = images
        with pytest.raises(InputError, match=r"images must be uint8 .*, not an EvalBatch"):
            session.features(wrong)
        others: list[Any] = [features.numpy(), features.half(), features[:, 1:]]
        for other in others:
            with pytest.raises(InputError, match=r"features must be float32 \[N, 64\], .* not "):
                session.logits(other)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C interrupt, which a shell turns off for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_step_leaves_no_trace(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C takes effect after the step, or before it while its batch is loaded."""
    with open_session(recipe) as whole, open_session(recipe) as session:
        trainer = session.trainer
        records = [whole.step() for _ in range(4)]
        take, loading = trainer.train_step, trainer.batches()

        def interrupted(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return take(*arguments)

        monkeypatch.setattr(trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.step()
        monkeypatch.setattr(trainer, "train_step", take)
        assert trainer.step == 1
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert session.step() == records[1]

        real = type(loading).__next__

        def cut_off(self: Any) -> Any:
            real(self)
            raise KeyboardInterrupt

        monkeypatch.setattr(type(loading), "__next__", cut_off)
        with pytest.raises(KeyboardInterrupt):
            session.step()
        monkeypatch.setattr(type(loading), "__next__", real)
        loading.close()
        assert session.step() == records[2]
        assert session.step() == records[3]


def test_a_step_that_failed_is_not_built_upon(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: torch.Tensor) -> None:
        raise ValueError("planted")

    with open_session(recipe) as session:
        apply = session.trainer.statistics.apply
        monkeypatch.setattr(session.trainer.statistics, "apply", fail)
        with pytest.raises(ValueError, match="planted"):
            session.step()
        monkeypatch.setattr(session.trainer.statistics, "apply", apply)
        with pytest.raises(InputError, match=r"step 1 ended part way by ValueError, .* another"):
            session.step()
        session.features(session.images(2).images)


def test_steps_of_ones_own_keep_the_order(recipe: Recipe) -> None:
    """A session goes on with the batch of the step that its trainer is at."""
    with open_session(recipe) as whole, open_session(recipe) as session:
        records = [whole.step() for _ in range(4)]
        session.step()
        session.views(2)
        with contextlib.closing(session.trainer.batches()) as batches:
            for _ in range(2):
                session.trainer.train_step(next(batches))
        assert session.step() == records[3]


def test_wrong_names_and_closed_sessions_are_told(recipe: Recipe) -> None:
    session = open_session(recipe)
    with pytest.raises(InputError, match=r"which must be one of 'train', 'val', .*, not 'test'"):
        session.images(4, "test")  # type: ignore[arg-type]
    session.close()
    with pytest.raises(InputError, match="the session is closed"):
        session.step()


def test_the_end_of_the_schedule_is_told(recipe: Recipe) -> None:
    short = replace(recipe, schedule=ScheduleConfig(epochs=2 * 16 / tiny.SAMPLES, warmup=0))
    with open_session(short) as session:
        session.step()
        session.step()
        with pytest.raises(InputError, match="all 2 steps of the schedule are done"):
            session.step()


def test_what_a_recipe_lacks_is_told(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = replace(recipe, data=replace(recipe.data, val=""), probe=ProbeConfig())
    with (
        open_session(alone) as session,
        pytest.raises(InputError, match=r"data\.val nor probe\.val is"),
    ):
        session.images(3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="a session is one process"):
        open_session(recipe)


def test_images_of_the_sets_that_are_measured(recipe: Recipe) -> None:
    """A run without data.val has them as probe.train and probe.val."""
    probe = replace(recipe.probe, train=recipe.data.train, val=recipe.data.val)
    alone = replace(recipe, data=replace(recipe.data, val=""), probe=probe)
    with open_session(recipe) as session:
        expected = {which: session.images(8, which) for which in ("train", "val")}
        both = session.images(8, "probe.train"), session.images(8, "probe.val")
    with open_session(alone) as session:
        for which, like in (
            *(("val", "val"), ("probe.val", "val"), ("probe.train", "train"), ("train", "train")),
        ):
            found = session.images(8, which)  # type: ignore[arg-type]
            assert torch.equal(found.images, expected[like].images), which
    assert torch.equal(both[0].images, expected["train"].images)
    assert torch.equal(both[1].images, expected["val"].images)
    never = replace(alone, probe=replace(probe, every=0))
    with open_session(never) as session, pytest.raises(InputError, match=r"probe\.every is 0"):
        session.images(8)


def test_errors_of_a_session_name_fields_and_no_options(recipe: Recipe) -> None:
    train(replace(recipe, steps=4))
    other = replace(recipe, seed=1)
    with pytest.raises(InputError) as caught:
        open_session(other, continue_run=True)
    text = str(caught.value)
    assert "give another recipe.run" in text
    assert "recipe.checkpoint.branch" in text
    assert "dataclasses.replace" in text
    assert " --" not in text
    match = r"recipe\.compile=False.*recipe\.probe\.head_lr 3 --x"
    with pytest.raises(InputError, match=match), fields_in_messages(recipe):
        raise InputError("use --no-compile, or --probe.head-lr 3 --x")


def test_importing_the_engine_does_no_work() -> None:
    code = "import sys, engine; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_name_of_the_engine_is_there() -> None:
    for name in engine._PLACES:
        assert getattr(engine, name).__name__ == name
        assert name in dir(engine)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        engine.nothing  # noqa: B018
