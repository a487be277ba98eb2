"""Print what a process has to say to its user while it works."""

import os
import signal
import threading

from rich.console import Console

from shards.errors import printable


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


class _Console(Console):
    """Treat the end of the reader of standard output, such as `head`, as that of a terminal."""

    def on_broken_pipe(self) -> None:
        """Send SIGHUP to this process, which saves and stops as after a lost connection."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())  # the other console and Python's exit write there too
        os.close(nowhere)
        os.kill(os.getpid(), signal.SIGHUP)


def _console(quiet: bool) -> Console:
    return _Console(markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet)
