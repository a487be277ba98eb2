"""Processes are told apart, and the dead from the living."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.processes import identity as identity_module
from engine.processes.identity import agent_identity
from tests.helpers.jobs import until
from tests.helpers.places import ROOT

TELL = "from engine.processes.identity import agent_identity; print(agent_identity(), flush=True)"

needs_linux = pytest.mark.skipif(not Path("/proc/self/ns").exists(), reason="needs /proc")


def identity_of_the_dead(**environment: str) -> str:
    """Of a process that ran and ended."""
    command = [sys.executable, "-c", TELL]
    everything = os.environ | environment
    return subprocess.check_output(command, cwd=ROOT, env=everything, text=True).strip()


@needs_linux
def test_torchrun_is_known_by_its_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert identity_of_the_dead(TORCHELASTIC_RUN_ID="none") == agent_identity()


@needs_linux
def test_the_living_and_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    is_dead = identity_module.is_dead
    assert not is_dead("what is this")
    command, pipe = [sys.executable, "-c", f"{TELL}; input()"], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        identity = process.stdout.readline().strip()
        place, start = identity.rsplit(":", 1)
        assert not is_dead(identity)
        assert is_dead(f"{place}:{int(start) - 1}"), "the number was used again"
        assert not is_dead(f"another {place}:{int(start) - 1}"), "nobody here can tell"
        process.kill()
        until(lambda: is_dead(identity))
        assert process.returncode is None, "a zombie, nobody has waited for it"
    assert is_dead(identity)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(identity_module, "os", SimpleNamespace(kill=refuse))
    assert not is_dead(identity), "another user's process, which /proc may hide"


def test_the_start_is_read_behind_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "12").mkdir()
    after = " ".join(["R", *map(str, range(4, 53))])  # field n holds n
    monkeypatch.setattr(identity_module, "_PROC", tmp_path)
    for name in (b"a) S (b", "a train\u00e9".encode()[:-1]):  # a name may be cut inside of a letter
        (tmp_path / "12" / "stat").write_bytes(b"12 (" + name + f") {after}\n".encode())
        assert identity_module._state(12) == ("R", "22")
