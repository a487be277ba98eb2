"""What ends a process is one line, where a user can do something about it."""

import errno
import os
from collections.abc import Callable

import numpy
import pytest
import torch

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


FULL = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 10.44 MiB is free. Process 7 has 79.13 GiB memory in use. If reserved but unallocated "
    "memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError(FULL), FULL.partition(" Process")[0].rstrip(".")),
        (
            torch.OutOfMemoryError(f"Caught it in thread 1.\nFile a.py\n{FULL}"),
            "CUDA out of memory.",
        ),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors"),
            "CUDA error: out of memory:",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), "CUBLAS_STATUS_"),
    ],
    ids=["torch's", "a thread's", "CUDA's", "cuBLAS's"],
)
def test_a_full_gpu(error: Exception, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    report_failure(error)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")
    assert "by a larger --batch.micro" in line
    assert "expandable" not in line


@pytest.mark.parametrize(
    ("allocate", "size"),
    [
        (lambda: torch.empty(10**15, dtype=torch.uint8), "for 1,000,000.0 GB more"),
        (lambda: numpy.empty(10**15, dtype=numpy.uint8), "for 909. TiB more"),
        (lambda: bytearray(10**15), "no room: "),
    ],
    ids=["torch's", "numpy's", "Python's"],
)
def test_a_full_memory(
    allocate: Callable[[], object], size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as failure:
        allocate()
    report_failure(failure.value)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rank 0: the memory of this machine has no room")
    assert size in line
    assert "by a larger --batch.micro" in line


@pytest.mark.parametrize(
    "text",
    [
        "NCCL error in: x.cpp:9, remote process exited or there was a network error, NCCL 2.28",
        "NCCL communicator was aborted on rank 1.",
        "[../x.cc:10] Connection closed by peer [127.0.0.1]:9. This is typically a crash.",
        "[../x.cc:10] Timed out waiting 5000ms for recv operation to complete",
    ],
)
def test_a_process_that_lost_another(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    report_failure(RuntimeError(f"{text}\nncclRemoteError: more"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rank 0 lost another process: ")
    assert "typically" not in line
    assert ("--parallel.timeout" in line) == ("Timed out" in text)
