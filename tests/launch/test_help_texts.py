"""What --help says about a field is running text, as wide as the terminal."""

from collections.abc import Callable
from functools import partial

import pytest

from engine.recipe import load
from launch import evaluate, export
from launch.command_line import parse_recipe
from tests.helpers.command_help import field_texts
from tests.helpers.places import RECIPES

LONGEST = 200  # characters: the frames of a wide terminal stand side by side
QUICKSTART = str(RECIPES / "quickstart.py")


@pytest.mark.parametrize(
    ("parse", "config"),
    [
        (partial(parse_recipe, [QUICKSTART, "--help"]), load(QUICKSTART)),
        (partial(evaluate.parse, ["semi-supervised", "--help"]), evaluate.SemiSupervised),
        (partial(export.parse, ["--help"]), export.Export),
    ],
)
def test_a_wide_terminal_shows_each_text_in_one_line(
    parse: Callable[[], object],
    config: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse()
    shown = capsys.readouterr().out
    broken = [text for _, text in field_texts(config) if "\n" in text]
    texts = [text for text in (" ".join(text.split()) for text in broken) if len(text) < LONGEST]
    assert len(texts) >= 4
    assert [text for text in texts if text not in shown] == []
