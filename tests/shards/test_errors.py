"""What strangers wrote reaches the terminal as one line of printable characters."""

import pytest

from engine.log.terminal import Terminal
from engine.processes.failures import report_failure
from shards.errors import InputError, printable

HOSTILE = "a\x1b[2J\r\nerror: all is lost[/x]\u202e\x9b2J\udcff\x00\x07"


@pytest.mark.parametrize("text", ["", "runs/a b/[x]#*.tar", "Zürich 東京 ñ 🐙", r"C:\new"])
def test_what_prints_stays(text: str) -> None:
    assert printable(text) == text


def test_what_does_not_print_is_escaped() -> None:
    text = printable(HOSTILE)
    assert text.isprintable()
    assert text == r"a\x1b[2J\r\nerror: all is lost[/x]\u202e\x9b2J\udcff\x00\x07"
    assert printable(text) == text  # a text that is quoted in another is escaped once


def test_errors_and_lines_are_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    report_failure(InputError(f"{HOSTILE}: missing"))
    report_failure(OSError(f"{HOSTILE}: missing"))
    terminal = Terminal(main=True)
    terminal.say(HOSTILE)
    terminal.report(HOSTILE)
    out, err = capfd.readouterr()
    assert out == f"{printable(HOSTILE)}\n" * 2
    assert err == f"error: {printable(HOSTILE)}: missing\n" * 2
