"""What strangers wrote is text wherever it is shown: markup and emoji codes mean nothing."""

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console

from engine.evaluation.results import Result, show
from engine.log.terminal import Terminal
from shards.errors import printable
from tests.helpers.imports import modules

# The classes of rich that read markup or emoji codes in a text, and what turns that off.
OFF = {"Console": ("markup", "emoji"), "_Console": ("markup", "emoji"), "TextColumn": ("markup",)}
HOSTILE = "[/x] [red]a[/red] :apple: [link=file:///etc]b[/link]"


def _calls(source: str) -> list[tuple[str, set[str]]]:
    """The calls of these classes, each with the options that are turned off."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OFF:
            off = {
                str(option.arg)
                for option in node.keywords
                if isinstance(option.value, ast.Constant) and option.value.value is False
            }
            found.append((node.func.id, off))
    return found


def test_calls_are_seen() -> None:
    assert _calls("a = Console(markup=False, emoji=True, quiet=x)") == [("Console", {"markup"})]
    assert _calls("TextColumn('a')\nText('b')") == [("TextColumn", set())]


@pytest.mark.parametrize("path", modules().values(), ids=modules().keys())
def test_nothing_reads_markup(path: Path) -> None:
    source = path.read_text()
    for name, off in _calls(source):
        assert set(OFF[name]) <= off, f"{path}: {name}(...) needs {OFF[name]} turned off"
    # These read markup whatever the console does.
    for name in ("from_markup", "rich.print", "from rich import print", "render_markup"):
        assert name not in source


def test_a_line_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(main=True)
    terminal.say(HOSTILE)
    terminal.report(f"{HOSTILE}\x1b[2J\n")
    assert capsys.readouterr().out == f"{HOSTILE}\n{HOSTILE}\\x1b[2J\\n\n"


def test_a_table_is_printed_as_it_is() -> None:
    output = io.StringIO()
    console = Terminal(main=True).console
    console.file = output
    console.width = 200
    show(Result({}, [{HOSTILE: f"{HOSTILE}\x1b[2J", "b\x1b\n": 0.5}]), console)
    text = output.getvalue()
    assert text.count(printable(HOSTILE)) == 2
    assert "\\x1b[2J" in text
    assert "b\\x1b\\n" in text
    assert "\x1b" not in text


def test_markup_would_fail_otherwise() -> None:
    from rich.errors import MarkupError

    with pytest.raises(MarkupError):
        Console(file=io.StringIO()).print(HOSTILE)
