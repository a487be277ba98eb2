"""What is shown of long work: a bar on a terminal, lines now and then elsewhere."""

import io
import re
import sys

import pytest

from engine.log import progress
from engine.log.progress import show_progress
from engine.log.terminal import Terminal


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_lines_come_after_2_and_then_every_20_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress(Terminal(main=True), "features", 1000, 100) as shown:
        for _ in range(90):
            clock.now += 0.5
            shown.advance(10)
            if clock.now == 130:
                shown.name("lr 0.3, epoch 12 of 80")
    assert capsys.readouterr().out.splitlines() == [
        "features: 140 of 1,000, 43 s left",
        "features: 540 of 1,000, 23 s left",
        "lr 0.3, epoch 12 of 80: 940 of 1,000, 3 s left",
    ]


def test_other_processes_show_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(Terminal(main=False), "features", 10) as shown:
        clock.now += 100
        shown.advance(5)
    assert capsys.readouterr().out == ""


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is in hand, as it is, without lines."""
    monkeypatch.setenv("TERM", "xterm")
    output = Screen()
    monkeypatch.setattr(sys, "stdout", output)
    terminal = Terminal(main=True)
    with show_progress(terminal, "[red]a", 10) as shown:
        shown.name("lr [0.3]")
        shown.advance(4)
        shown._bars.refresh()
    told = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert "lr [0.3]" in told
    assert "4/10" in told
    assert "left" not in told
