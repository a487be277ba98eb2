"""What --help says about an option is running text, as wide as the terminal."""

import runpy
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import pytest

from engine.recipe import load
from launch import bench, evaluate, export, pack
from launch.benchmarks.step import bench_step
from launch.help_texts import join_help_lines
from tests.helpers.command_help import field_texts, parameter_texts
from tests.helpers.places import RECIPES
from tests.helpers.recipes import parse_recipe

LONGEST = 200  # characters: the frames of a wide terminal stand side by side
QUICKSTART = str(RECIPES / "quickstart.py")


def run_pack(arguments: list[str]) -> object:
    with mock.patch.object(sys, "argv", ["pack.py", *arguments]):
        return runpy.run_path(pack.__file__, run_name="__main__")


@pytest.mark.parametrize(
    ("run", "arguments", "documented"),
    [
        (parse_recipe, [QUICKSTART], field_texts(load(QUICKSTART))),
        (evaluate.parse, ["semi-supervised"], field_texts(evaluate.SemiSupervised)),
        (export.parse, [], field_texts(export.Export)),
        (bench.main, ["step"], parameter_texts(bench_step)),
        (run_pack, [], parameter_texts(pack.main)),
    ],
    ids=["train", "evaluate", "export", "bench", "pack"],
)
def test_a_wide_terminal_shows_each_text_in_one_line(
    run: Callable[[list[str]], object],
    arguments: list[str],
    documented: Iterator[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = [" ".join(text.split()) for _, text in documented]
    texts = [text for text in texts if len(text) < LONGEST]
    assert len(texts) >= 8
    monkeypatch.setenv("COLUMNS", "1300")
    with pytest.raises(SystemExit):
        run([*arguments, "--help"])
    shown = capsys.readouterr().out
    assert [text for text in texts if text not in shown] == []


def test_running_text_is_joined_at_any_character() -> None:
    """Tyro by itself leaves a line break before a number, a quote or a parenthesis."""

    def program(*, count: int = 1) -> None:
        """Do it.

        First it permutes all samples, at about
        48 bytes each ("all" of them,
        (really)).

        - one
        - two

        Args:
            count: How often,
                1 by default.
        """

    join_help_lines(program, ["--help"])
    assert program.__doc__ == (
        'Do it.\n\nFirst it permutes all samples, at about 48 bytes each ("all" of them, (really)).'
        "\n\n- one\n- two\n\nArgs:\n    count: How often, 1 by default."
    )
