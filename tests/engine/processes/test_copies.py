"""Batches are copied in a stream of their own, which kernels wait for; test_gpu.py has the rest."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from engine.processes.copies import Copies


def test_on_a_cpu_nothing_is_copied() -> None:
    views, labels = torch.rand(2, 3), torch.arange(3)
    taken = Copies(torch.device("cpu")).take(views, labels)
    assert taken[0] is views
    assert taken[1] is labels


@dataclass
class Stream:
    """Stands in for a stream of a GPU."""

    name: str
    waits_for: list["Stream"] = field(default_factory=list)

    def wait_stream(self, other: "Stream") -> None:
        self.waits_for.append(other)


@dataclass
class Pinned:
    """Stands in for a tensor of pinned memory, and for its copy."""

    copied_in: Stream | None = None
    used_in: Stream | None = None

    def to(self, device: torch.device, non_blocking: bool) -> "Pinned":
        assert device == torch.device("cuda", 1)
        assert non_blocking
        return Pinned(current[-1])

    def record_stream(self, stream: Stream) -> None:
        self.used_in = stream


current: list[Stream] = []


def test_kernels_wait_for_the_copies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy waits for a kernel, and the memory of a copy stays until its last kernel is done."""

    @contextmanager
    def under(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    kernels = Stream("kernels")
    current[:] = [kernels]
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "stream", under)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    copies: Any = Copies(torch.device("cuda", 1))
    for _ in range(2):
        taken = copies.take(Pinned(), Pinned())
        assert [one.copied_in for one in taken] == [copies.stream] * 2
        assert [one.used_in for one in taken] == [kernels] * 2
    assert kernels.waits_for == [copies.stream] * 2
    assert copies.stream.waits_for == []
