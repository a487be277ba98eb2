"""What --debug-step tells; test_trainer.py takes a whole debug step."""

import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from engine import debug


@pytest.mark.parametrize(("system", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_the_memory_of_the_host(monkeypatch: pytest.MonkeyPatch, system: str, unit: int) -> None:
    """The kernel of macOS counts it in bytes, and that of Linux in kilobytes."""
    usage = SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
    monkeypatch.setattr(resource, "getrusage", lambda _: usage)
    monkeypatch.setattr(sys, "platform", system)
    assert debug._memory(torch.device("cpu")) == "host 3.0 GiB"
