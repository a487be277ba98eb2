"""Runs shown by Visdom's own server: it is compared with metrics.jsonl, and it is killed."""

import io
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from engine.log import journal, sending
from engine.log.curves import name_curve
from engine.log.metrics import LogConfig, MetricsLog
from engine.log.terminal import Terminal
from engine.log.tracker_ids import run_id
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.training import train
from tests.helpers.visdom_server import Points, VisdomServer, read_curves

pytest.importorskip("visdom", reason="visdom is not installed: launch/README.md has the commands")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VisdomServer]:
    monkeypatch.setattr(sending, "PAUSE", 0.1)
    monkeypatch.setattr(sending, "RETRY", 0.2)
    monkeypatch.setattr(sending, "UNSENT", 60.0)  # this machine may be loaded
    found = VisdomServer(tmp_path / "visdom")
    yield found
    found.kill()


def open_log(run: Path, start: int, config: LogConfig) -> tuple[MetricsLog, io.StringIO]:
    terminal, output = Terminal(main=True), io.StringIO()
    terminal.console = Console(file=output, width=999)
    log = MetricsLog(str(run), start, 99, terminal)
    log.describe({"seed": 1, "run": "<script>"}, ["seed"], config)
    return log, output


def write(log: MetricsLog, *steps: int) -> None:
    for step in steps:
        log.write({"step": step, "loss": step / 7, "lr": 1 / (1 + step)})


def close(log: MetricsLog) -> None:
    log.stop()
    log.finish()


def wanted(run: Path | str) -> dict[str, Points]:
    """Return the points that the curves of a run should have, by its metrics.jsonl."""
    curves: dict[str, Points] = {}
    for record in journal.read(str(run)):
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                curves.setdefault(name_curve(key), []).append((record["step"], value))
    return curves


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def mine(server: VisdomServer, run: Path) -> dict[str, Any]:
    """Return the run's windows in the environment that a URL named, by their names."""
    before = f"{run.name}-{run_id(str(run), print)}/"
    found = server.windows("mine").items()
    return {name.removeprefix(before): one for name, one in found if name.startswith(before)}


def curves(server: VisdomServer, run: Path) -> dict[str, Points]:
    return read_curves(mine(server, run))


def test_a_run_and_its_continuation(server: VisdomServer, tmp_path: Path) -> None:
    data: DataConfig = tiny.draw_data(tmp_path / "data")
    run = tmp_path / "first"
    recipe = tiny.recipe(data, run, steps=6, log=LogConfig(every=1, visdom=server.url))
    train(recipe)
    environment = f"first-{run_id(str(run), print)}"
    assert environment in server.environments()

    # The next process continues from step 4, because the checkpoint of step 6 is damaged.
    (run / "checkpoints" / "step_00000006" / "commit.json").unlink()
    train(replace(recipe, steps=10))
    curves, expected = server.curves(environment), wanted(run)
    known = [name for name in curves if not name.startswith("eval/reference")]
    assert {name: curves[name] for name in known} == {name: expected[name] for name in known}
    assert {"train/loss", "eval/knn_top1", "schedule/lr", "system/data_wait"} <= set(known)
    assert [step for step, _ in curves["train/loss"]] == list(range(1, 11))
    windows = server.windows(environment)
    assert windows["views/batch"]["title"] == "views/batch, step 10"
    assert "<td>schedule.base_lr&emsp;</td><td>2.0</td>" in windows["recipe"]["content"]
    assert (server.folder / f"{environment}.json").exists()  # so a restarted server has it

    train(replace(recipe, run=str(tmp_path / "other" / "first"), steps=2))
    assert len(server.environments()) == 3  # Visdom's own "main", and one for each run


def test_the_server_dies_and_comes_back(server: VisdomServer, tmp_path: Path) -> None:
    run, config = tmp_path / "run", LogConfig(visdom=f"{server.url}/mine")
    log, output = open_log(run, 0, config)
    log.pictures(torch.zeros(2, 3, 3, 8, 8), 1)
    write(log, *range(1, 5))
    wait_for(lambda: len(curves(server, run).get("train/loss", ())) == 4)

    server.kill()
    write(log, *range(5, 9))
    wait_for(lambda: "cannot be reached" in output.getvalue())
    server.start()  # it has lost everything
    wait_for(lambda: len(curves(server, run).get("train/loss", ())) == 8)

    server.kill()
    server.start()  # before anything was sent meanwhile
    write(log, 9)
    wait_for(lambda: len(curves(server, run).get("train/loss", ())) == 9)
    close(log)
    assert curves(server, run) == wanted(run)
    assert {"views/batch", "recipe"} <= mine(server, run).keys()
    assert "<script>" not in mine(server, run)["recipe"]["content"]
    assert output.getvalue().count("cannot be reached") == 1


def test_a_log_ends_though_the_server_is_dead(
    server: VisdomServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "UNSENT", 10.0)
    run, config = tmp_path / "run", LogConfig(visdom=f"{server.url}/mine")
    log, output = open_log(run, 0, config)
    write(log, 1)
    wait_for(lambda: curves(server, run))
    server.kill()
    write(log, 2, 3)
    close(log)
    # The server may have died before it answered for the first step, which it showed already.
    assert re.search("Visdom: [23] logged steps did not arrive", output.getvalue())
    assert [record["step"] for record in journal.read(str(run))] == [1, 2, 3]

    server.start()
    log, output = open_log(run, 3, config)  # the next start sends them
    close(log)
    assert curves(server, run) == wanted(run)


def test_runs_share_an_environment(server: VisdomServer, tmp_path: Path) -> None:
    config = LogConfig(visdom=f"{server.url}/mine")
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    logs = [open_log(run, 0, config)[0] for run in runs]
    for step in (1, 2, 3):
        for log, factor in zip(logs, (1, 10), strict=True):
            log.write({"step": step, "loss": factor * step / 7})
    for log in logs:
        close(log)
    for run in runs:
        assert curves(server, run) == wanted(run)
        title = mine(server, run)["train/loss"]["title"]
        assert title == f"train/loss, run-{run_id(str(run), print)}"
