"""Call functions in a process that may take little more memory than it has, and little time."""

import resource
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.helpers.processes import FORKED

MEMORY = 512 << 20  # bytes of address space beyond those that the imports take
SECONDS = 10  # for each input


class TooLong(BaseException):
    """A call took too long. No code that is tested catches it."""


def _raise_too_long(*_: object) -> None:
    raise TooLong


def limit_memory(more: int = MEMORY) -> None:
    """Let this process take at most `more` bytes of address space from now on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def call_within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call `call`. Raises TooLong when it takes more than `seconds`."""
    before = signal.signal(signal.SIGALRM, _raise_too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable[[], Any], seconds: float = SECONDS) -> str:
    """Return `accepted`, or the class and the text of what the call raised."""
    try:
        call_within(seconds, call)
    except (Exception, TooLong) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def _outcomes(function: Callable[[Any], Any], inputs: Iterable[Any]) -> list[str]:
    limit_memory()
    return [outcome(lambda one=one: function(one)) for one in inputs]  # type: ignore[misc]


def outcomes(function: Callable[[Any], Any], inputs: Iterable[Any]) -> list[str]:
    """Return the outcome of each input, in a process of its own that may take MEMORY."""
    found: list[str] = call_apart(_outcomes, function, list(inputs))
    return found


def call_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function returns in a process of its own.

    Raises BrokenProcessPool when that process dies, as of a fault in a library's C code.
    """
    with ProcessPoolExecutor(1, FORKED) as process:
        return process.submit(function, *arguments).result()
