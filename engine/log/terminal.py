"""Print what a process has to say to its user while it works."""

import os
import signal
import sys
import threading
from typing import IO, Any

from rich.console import Console

from shards.errors import printable
from shards.storage.space import is_full


class Terminal:
    """Print to standard output.

    `say` prints on the first process only. `report` prints on every process, each text once.
    """

    def __init__(self, main: bool) -> None:
        """Create the terminal of one process. `main` is True on the first process only."""
        self.console = _console(quiet=not main)
        """It draws tables and progress bars, and is quiet on all processes except the first."""
        self._own = _console(quiet=False)
        self._told: set[str] = set()
        self._lock = threading.Lock()  # loaders, savers and logs report from threads

    def say(self, text: str) -> None:
        """Print a line on the first process only."""
        self.console.print(printable(text))

    def report(self, text: str) -> None:
        """Print a line on this process, unless this process has reported the same line before."""
        with self._lock:
            known = text in self._told
            self._told.add(text)
        if not known:
            self._own.print(printable(text))


def flush_output() -> None:
    """Write what is left for standard output, or drop it when it is a file on a full disk."""
    if sys.stdout is None:  # it was closed before this program began
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        if not is_full(error):
            raise
        _discard(sys.stdout)  # Python's exit would fail on it again


class _Console(Console):
    """Print what standard output takes, so that a run does not depend on who reads it.

    The end of the reader, such as `head`, is treated as that of a terminal.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, or lose the text when standard output is a file on a full disk."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            if not is_full(error):
                raise
            self.quiet = True  # with which rich drops what it keeps for the next print
            super().print()
            self.quiet = False

    def on_broken_pipe(self) -> None:
        """Send SIGHUP to this process, which saves and stops as after a lost connection."""
        self.quiet = True
        _discard(self.file)  # the other console and Python's exit write there too
        os.kill(os.getpid(), signal.SIGHUP)


def _discard(file: IO[str]) -> None:
    """Let what is written to a file's number from now on go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)


def _console(quiet: bool) -> Console:
    return _Console(markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet)
