"""Each mistake in a command line is one line that names the argument."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from launch import bench, evaluate, export
from launch.plain_errors import list_options, plain_errors
from shards.errors import InputError
from tests.helpers.places import ROOT

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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("a --sise 3", "unknown option '--sise': did you mean --size?"),
        ("a --Size 3", "unknown option '--Size': did you mean --size?"),
        ("a --sise=3", "unknown option '--sise=3': did you mean --size?"),
        ("a --xyz 3", "unknown option '--xyz': --help lists what can be given"),
        ("--sise a", "unknown option '--sise': did you mean --size?"),
        ("--size 1", "missing: SOURCE; --help says what each argument is"),
        ("a --rates 1 x", r"--rates takes \[FLOAT \[FLOAT ...\]\]: .*'x'.*"),
    ],
)
def test_the_nearest_option_is_proposed(arguments: str, line: str, capsys: Capture) -> None:
    given = arguments.split()
    with (
        pytest.raises(InputError, match=f"^{line.replace('?', '[?]')}$"),
        plain_errors(given, lambda: list_options(Command)),
    ):
        tyro.cli(Command, args=given)
    output = capsys.readouterr()
    assert output.err == output.out == ""


@pytest.mark.parametrize(
    ("main", "arguments", "line"),
    [
        (evaluate.main, "kn RUN", "unknown PROTOCOL 'kn': did you mean knn?"),
        (evaluate.main, "Linear RUN", "unknown PROTOCOL 'Linear': did you mean linear?"),
        (evaluate.main, "neighbors RUN", "unknown PROTOCOL 'neighbors': did you mean neighbours?"),
        (evaluate.main, "linear RUN --Fast", "unknown option '--Fast': did you mean --fast?"),
        (
            evaluate.main,
            "knn RUN --train x",
            "unknown option '--train': did you mean --data.train?",
        ),
        (evaluate.main, "knn RUN --data.trian x", "'--data.trian': did you mean --data.train?"),
        (evaluate.main, "features RUN A B --over", "option '--over': did you mean --overwrite?"),
        (export.main, "RUN OUT --formats onnx", "option '--formats': did you mean --format?"),
        (bench.main, "stepp", "unknown argument 'stepp': did you mean step?"),
        (bench.main, "step --recip x", "unknown option '--recip': did you mean --recipe?"),
    ],
)
def test_commands_propose_the_nearest_name(
    main: Callable[[list[str]], int], arguments: str, line: str, capsys: Capture
) -> None:
    assert main(arguments.split()) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ")
    assert told.endswith(line)


def test_packing_proposes_the_nearest_name() -> None:
    command = [sys.executable, "launch/pack.py", "a", "b", "--window-percentile", "1", "99"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    line = "error: unknown option '--window-percentile': did you mean --window-percentiles?\n"
    assert (found.returncode, found.stderr) == (1, line)
