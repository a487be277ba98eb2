"""Variables of a launcher that are wrong or left over are refused in one line, and never a hang."""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from engine.processes import launcher
from shards.errors import InputError
from tests.helpers.places import ROOT

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "abc"}, "the variable WORLD_SIZE is 'abc', no number: start the processes"),
        ({"RANK": ""}, "the variable RANK is '', no number"),
        ({"WORLD_SIZE": "0"}, "the variable WORLD_SIZE is 0: start"),
        ({"WORLD_SIZE": "-1"}, "the variable WORLD_SIZE is -1: start"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is 1: start"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3, but WORLD_SIZE is 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is -1, but WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is"),
    ],
)
def test_variables_that_contradict_each_other(
    variables: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=text):
        launcher.check_variables()


def test_a_launcher_may_set_local_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher.check_variables()
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    launcher.check_variables()


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_ADDR is set, but MASTER_PORT is not set"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "MASTER_PORT is 'x', no number"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "MASTER_PORT is 99999: start"),
    ],
)
def test_nowhere_to_meet(
    variables: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=text):
        launcher.connect(timedelta(seconds=5))


def test_a_port_that_another_program_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        with pytest.raises(InputError, match=f"another program uses port {port} of this machine"):
            launcher.connect(timedelta(seconds=5))


def test_others_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(InputError, match=f"no connection to the other processes at 127.*:{port}"):
        launcher.connect(timedelta(seconds=2))


def test_a_long_wait_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "LONG", 0.05)
    for name, value in (("MASTER_ADDR", "node7"), ("MASTER_PORT", "29500"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with launcher.telling_long_waits():
        pass
    time.sleep(0.2)
    assert capsys.readouterr().err == ""
    with launcher.telling_long_waits():
        time.sleep(0.5)
    told = capsys.readouterr().err
    assert "rank 0 on " in told
    assert "waits for the other processes (4 in all) at node7:29500" in told


@pytest.mark.parametrize(
    "command", ["launch/train.py quickstart", "launch/evaluate.py knn nothing"]
)
def test_the_commands_say_it_in_one_line(command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= {"WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert "WORLD_SIZE is 2, but MASTER_ADDR is not set" in line
    assert "Traceback" not in done.stderr
