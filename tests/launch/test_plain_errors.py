"""Each mistake in a command line is one line that names the argument."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from launch.plain_errors import plain_errors
from shards.errors import InputError

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Command:
    """A command with an argument of each kind that our commands have."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    size: int = 1
    rate: float = 0.1
    limit: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    rates: tuple[float, ...] = (0.1,)
    precision: Literal["fp32", "bf16"] = "fp32"
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size must not be negative")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("", "missing: SOURCE; --help says what each argument is"),
        ("a b", "unknown argument 'b': --help lists what can be given"),
        ("a --sise 3", "unknown option '--sise': --help lists what can be given"),
        ("--sise a", "missing: SOURCE, or an option before it is unknown"),
        ("a --size", "--size takes a whole number: a value is missing"),
        ("a --size x", "--size takes a whole number, not 'x'"),
        ("a --size 1.5", "--size takes a whole number, not '1.5'"),
        ("a --limit four", "--limit takes a number or None, not 'four'"),
        ("a --rate it's", """--rate takes a number, not "it's\""""),
        ("a --betas 1 x", "--betas takes FLOAT FLOAT: .*'x'.*"),
        ("a --rates 1 x", r"--rates takes \[FLOAT \[FLOAT ...\]\]: .*'x'.*"),
        ("a --precision fp8", "--precision: 'fp8' is not one of fp32, bf16"),
        ("a --window 1", r"--window takes {None}\|{FLOAT FLOAT}: not \['1'\]"),
        ("a --window 1 x", r"--window takes {None}\|{FLOAT FLOAT}: not \['1', 'x'\]"),
        ("a --size -1", "size must not be negative"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_argument(
    arguments: str, line: str, capsys: Capture
) -> None:
    with pytest.raises(InputError, match=f"^{line}$"), plain_errors():
        tyro.cli(Command, args=arguments.split())
    assert capsys.readouterr().err == ""


def test_a_command_that_is_left_out_or_unknown() -> None:
    commands = {"one": lambda: 1, "two": lambda: 2}
    for arguments, line in (
        ([], "missing: one of one, two"),
        (["three"], "unknown argument 'three': --help lists what can be given"),
    ):
        with pytest.raises(InputError, match=f"^{line}$"), plain_errors():
            tyro.extras.subcommand_cli_from_dict(commands, args=arguments)


def test_help_still_prints_and_exits(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop, plain_errors():
        tyro.cli(Command, args=["--help"])
    assert not stop.value.code
    assert "SOURCE" in capsys.readouterr().out
