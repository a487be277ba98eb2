"""What ends a process is one line, where a user can do something about it."""

import errno
import os

import pytest

from engine.processes.failures import report_failure


def compile_error(text: str) -> Exception:
    kind = type("CppCompileError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    found: Exception = kind(text)
    return found


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_compiler_on_a_full_disk(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    report_failure(compile_error(f"Command:\ng++\nOutput:\nfatal error: {os.strerror(number)}\n"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: torch.compile: {os.strerror(number)} (/")
    assert "free): make room, set TMPDIR" in line


@pytest.mark.parametrize(
    "error", [compile_error("undefined reference"), RuntimeError(os.strerror(errno.ENOSPC))]
)
def test_other_failures_keep_their_name(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    report_failure(error)
    assert f"{type(error).__name__}: {error}" in capsys.readouterr().err
