"""Run a benchmark, and count its rows."""

import pytest

from launch import bench


def run(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that the command prints."""
    assert bench.main(command.split()) == 0
    return capsys.readouterr().out.splitlines()


def rows(lines: list[str], start: str) -> int:
    return sum(line.startswith(start) for line in lines)
