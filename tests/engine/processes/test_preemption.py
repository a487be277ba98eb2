"""Signals: the run is saved at the next step, on all processes alike, or ends at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import farewell
from engine.log import patience
from engine.log.journal import read
from engine.processes.preemption import SIGNALS
from engine.recipe import Recipe
from engine.report import report
from engine.state.checkpoint import CheckpointConfig
from engine.trainer import Trainer
from shards.loader import DataConfig
from tests.engine.test_trainer import comparable
from tests.helpers import tiny
from tests.helpers.jobs import Agent, ended, environment_of, small, until
from tests.helpers.places import ROOT
from tests.helpers.processes import FORKED
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, open_trainer, train

pytestmark = pytest.mark.versions


@pytest.fixture(autouse=True)
def _hears_sighup() -> Iterator[None]:
    """The tests themselves may run under nohup, whose processes ignore SIGHUP."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


def tell_at(trainer: Trainer, step: int, number: signal.Signals) -> None:
    """This process gets a signal while it computes `step`."""
    train_step = trainer.train_step

    def told(batch: Any) -> Any:
        if trainer.step + 1 == step:
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # for the thread that listens
        return train_step(batch)

    trainer.train_step = told  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def undisturbed(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    train(tiny.recipe(tiny_data, run, steps=12))
    return run


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_ends(
    tiny_data: DataConfig, tmp_path: Path, undisturbed: Path, number: signal.Signals
) -> None:
    handlers, threads = [signal.getsignal(n) for n in SIGNALS], set(threading.enumerate())
    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, steps=12))
    tell_at(trainer, 6, number)
    assert finish(trainer)
    assert trainer.step == 6
    assert (tmp_path / "checkpoints" / "step_00000006" / "commit.json").exists()
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    until(lambda: set(threading.enumerate()) <= threads)  # a thread may be about to end
    train(tiny.recipe(tiny_data, tmp_path, steps=12))
    assert comparable(tmp_path) == comparable(undisturbed)


def test_other_signals_mean_nothing(tiny_data: DataConfig, tmp_path: Path) -> None:
    """Such as that of a child's end, which torch's DataLoader has a handler for."""
    old = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, steps=8, probe=tiny.NO_PROBE))
        tell_at(trainer, 4, signal.SIGCHLD)
        assert finish(trainer)
    finally:
        signal.signal(signal.SIGCHLD, old)
    assert trainer.step == 8


def test_a_signal_in_an_evaluation(
    tiny_data: DataConfig, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation is left and comes again at the next start; its step has one line."""
    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, steps=12))
    assert trainer.probe is not None
    extract, calls = trainer.probe.extract, []

    def told(*arguments: Any, **options: Any) -> Any:
        calls.append(trainer.step)
        if calls == [5, 5, 10]:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return extract(*arguments, **options)

    monkeypatch.setattr(trainer.probe, "extract", told)
    finish(trainer)
    assert calls == [5, 5, 10]
    assert trainer.step == 10
    assert "knn_top1" not in read(str(tmp_path))[-1]
    train(tiny.recipe(tiny_data, tmp_path, steps=12))
    assert comparable(tmp_path) == comparable(undisturbed)


def stop_on_one(recipe: Recipe, step: int, where: str) -> tuple[bool, int]:
    """On a rank: train; the last rank alone gets a signal."""
    trainer = open_trainer(recipe)
    if os.environ["RANK"] == "1":
        if where == "step":
            tell_at(trainer, step, signal.SIGUSR1)
        else:
            assert trainer.probe is not None
            take = trainer.probe._take_weights

            def told() -> None:
                if trainer.step == step:
                    os.kill(os.getpid(), signal.SIGUSR1)
                    time.sleep(0.05)
                take()

            trainer.probe._take_weights = told  # type: ignore[method-assign]
    return finish(trainer), trainer.step


@pytest.mark.parametrize(
    ("where", "told", "step"),
    [("step", 6, 7), ("evaluation", 5, 5)],  # flags are read a step later
)
def test_processes_agree_on_the_step(
    ranks: Ranks, tiny_data: DataConfig, tmp_path: Path, where: str, told: int, step: int
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path, steps=20)
    assert ranks.run(stop_on_one, recipe, told, where, size=2) == [(True, step)] * 2
    assert (tmp_path / "checkpoints" / f"step_{step:08d}" / "commit.json").exists()


def test_machines_that_stay_go_on(ranks: Ranks, tiny_data: DataConfig, tmp_path: Path) -> None:
    """The one that was told ends well, the other one asks its launcher for a new start."""
    recipe = tiny.recipe(tiny_data, tmp_path, steps=20, probe=tiny.NO_PROBE)
    found = ranks.run(stop_on_one, recipe, 5, "step", size=2, machine=1)
    assert found == [(False, 6), (True, 6)]


def test_signals_that_are_repeated_harm_nothing(tiny_data: DataConfig, tmp_path: Path) -> None:
    """They come until the very end, as from a launcher that has lost its patience."""
    data = str(Path(tiny_data.train).parent)
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *small(data, str(tmp_path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3 "):
                break
        told = []
        for _ in range(200):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.01)
            if any((tmp_path / "lease").glob("*.json")) and _is_released(tmp_path):
                break
        told = process.stdout.read().splitlines()
    assert process.returncode == 0
    assert any(line.startswith("stopped after step") for line in told)


def test_the_end_of_the_outputs_reader_saves_and_ends(
    tiny_data: DataConfig, tmp_path: Path
) -> None:
    """As in `python launch/train.py ... | head`."""
    data = str(Path(tiny_data.train).parent)
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *small(data, str(tmp_path))]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("step 3 "):
                break
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    last = read(str(tmp_path))[-1]["step"]
    assert (tmp_path / "checkpoints" / f"step_{last:08d}" / "commit.json").exists()
    assert _is_released(tmp_path)


def test_nohup_keeps_a_run_alive(tiny_data: DataConfig, tmp_path: Path) -> None:
    data = str(Path(tiny_data.train).parent)
    arguments = small(data, str(tmp_path), "--steps", "12")
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments]
    with subprocess.Popen(["nohup", *command], stdout=-1, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(("step 3 ", "step 5 ")):
                process.send_signal(signal.SIGHUP)
    assert process.returncode == 0
    assert read(str(tmp_path))[-1]["step"] == 12


def test_nohup_does_not_make_torchruns_workers_deaf(tiny_data: DataConfig, tmp_path: Path) -> None:
    """torchrun ends all the same when its terminal does; the workers it tells must save."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does; processes inherit it
    data, run = str(Path(tiny_data.train).parent), tmp_path / "run"
    try:
        agent = Agent(small(data, str(run)), tmp_path / "output", processes=1)
    finally:
        signal.signal(signal.SIGHUP, old)
    with ended(agent):
        until(lambda: agent.step() > 3)
        os.kill(agent.process.pid, signal.SIGHUP)
        agent.wait()
    last = read(str(run))[-1]["step"]
    assert f"stopped after step {last} by SIGHUP" in agent.text()
    assert (run / "checkpoints" / f"step_{last:08d}" / "commit.json").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_the_end_of_torchrun_saves_and_ends(
    tiny_data: DataConfig, tmp_path: Path, processes: int
) -> None:
    """It was killed, so that it told nobody."""
    data, run = str(Path(tiny_data.train).parent), tmp_path / "run"
    agent = Agent(small(data, str(run)), tmp_path / "output", processes=processes)
    with ended(agent):
        until(lambda: agent.step() > 3)
        workers = agent.workers()
        assert len(workers) == processes
        agent.process.kill()
        agent.wait()
        until(lambda: not any(any(environment_of(pid)) for pid in workers))
    last = read(str(run))[-1]["step"]
    assert f"stopped after step {last} by the end of its torchrun" in agent.text()
    assert (run / "checkpoints" / f"step_{last:08d}" / "commit.json").exists()
    assert _is_released(run)


def _is_released(run: Path) -> bool:
    return '"released": true' in max((run / "lease").glob("*.json")).read_text()


def hang(data: DataConfig, run: str, output: Path) -> None:
    """In a process of its own, which writes its errors to `output`: a step never ends."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    soon = CheckpointConfig(grace=0.5)
    trainer = open_trainer(tiny.recipe(data, run, probe=tiny.NO_PROBE, checkpoint=soon))
    train_step = trainer.train_step

    def wait(batch: Any) -> Any:
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        return train_step(batch)

    trainer.train_step = wait  # type: ignore[method-assign]
    finish(trainer)


def test_no_end_of_the_step_within_the_grace(tiny_data: DataConfig, tmp_path: Path) -> None:
    output = tmp_path / "output"
    process = FORKED.Process(target=hang, args=(tiny_data, str(tmp_path), output))
    process.start()
    process.join(120)
    assert process.exitcode == 1
    told = output.read_text().splitlines()[-1]
    assert told.startswith("error: SIGTERM: the state was not saved within 0.5 s (checkpoint.grace")


@pytest.mark.parametrize("what", ["sheet", "report"])
def test_a_signal_in_the_farewell_leaves_it(
    tiny_data: DataConfig,
    tmp_path: Path,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All is saved by then, so that the rest is not worth a wait."""
    gate = threading.Event()

    def wait(*_: object, **__: object) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        gate.wait(60)
        return ""

    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, steps=5))
    assert trainer.probe is not None
    if what == "sheet":
        monkeypatch.setattr(trainer.probe, "draw_examples", wait)
    else:
        monkeypatch.setattr(report, "write_report", wait)
    begun = time.monotonic()
    assert finish(trainer)
    assert time.monotonic() - begun < 20
    assert patience.is_trying()
    gate.set()
    until(lambda: not patience.is_trying())
    told = capsys.readouterr().out
    assert "a signal came first" in told
    assert "SIGTERM came when all was saved: python launch/evaluate.py report " in told
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "checkpoints" / "step_00000005" / "commit.json").exists()


def hang_at_the_end(data: DataConfig, run: str, output: Path) -> None:
    """In a process of its own, which writes its errors to `output`: a store hangs at the end."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)

    def wait(trainer: Trainer) -> None:
        assert trainer.step == 3
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    farewell._tell_best = wait
    soon = CheckpointConfig(grace=0.5)
    recipe = tiny.recipe(data, run, steps=3, probe=tiny.NO_PROBE, checkpoint=soon)
    finish(open_trainer(recipe))


def test_a_store_that_hangs_when_all_is_saved(tiny_data: DataConfig, tmp_path: Path) -> None:
    output = tmp_path / "output"
    process = FORKED.Process(target=hang_at_the_end, args=(tiny_data, str(tmp_path), output))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    told = output.read_text().splitlines()[-1]
    assert told.startswith("SIGTERM: the state of step 3 is saved; what was left to do did not end")


def test_before_the_first_step_a_signal_ends_at_once(tiny_data: DataConfig, tmp_path: Path) -> None:
    data = str(Path(tiny_data.train).parent)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "train.py"), *small(data, str(tmp_path))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(1.5)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(10) == -signal.SIGUSR1
    finally:
        process.kill()
    assert not (tmp_path / "checkpoints").exists()
