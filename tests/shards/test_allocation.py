"""Freed memory stays with the process, unless the user has chosen otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from shards import allocation

# It writes and frees 256 MiB in blocks of 32 MiB, and counts the pages that the kernel filled.
PROGRAM = """
import resource, runpy, sys
kept = runpy.run_path(sys.argv[1])["keep_freed_memory"]()

def use():
    blocks = [b"x" * 2**25 for _ in range(8)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

use()
before = faults()
for _ in range(3):
    use()
print(kept, faults() - before)
"""
# It writes and frees 256 MiB, and prints how many of them it holds, before and after giving back.
GIVEN = """
import runpy, sys
functions = runpy.run_path(sys.argv[1])
functions["keep_freed_memory"]()

def held():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 // 2**20

blocks = [b"x" * 2**25 for _ in range(8)]
last = b"y" * 2**25  # above the freed blocks, so that they are not at the heap's end
del blocks
before = held()
functions["give_back_memory"]()
print(before, held())
"""
PAGES = 3 * 2**28 // 4096  # that three more rounds write


def run(**environment: str) -> tuple[bool, int]:
    """Return whether the process says that it keeps its memory, and the pages it was given."""
    command = [sys.executable, "-c", PROGRAM, str(allocation.__file__)]
    made = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    kept, pages = made.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_pages_are_used_again() -> None:
    kept, pages = run()
    assert kept
    assert pages < PAGES / 100


@pytest.mark.parametrize(
    "choice",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_the_users_choice_stays(choice: dict[str, str]) -> None:
    kept, pages = run(**choice)
    assert not kept
    assert pages > PAGES / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_given_back() -> None:
    command = [sys.executable, "-c", GIVEN, str(allocation.__file__)]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, made.stdout.split())
    assert before > 256
    assert after < 100
