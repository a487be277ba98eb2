"""What a process tells its user while it works."""

import threading

from rich.console import Console


class Terminal:
    """Standard output: what the first process says, and faults that every process tells once."""

    def __init__(self, main: bool) -> None:
        """`main`: whether this is the process that speaks for all."""
        self.console = _console(quiet=not main)
        """For what draws more than lines; it is quiet on all processes but the first."""
        self._own = _console(quiet=False)
        self._told: set[str] = set()
        self._lock = threading.Lock()  # loaders, savers and logs tell of faults from threads

    def say(self, text: str) -> None:
        """Print a line, on the first process only."""
        self.console.print(text)

    def report(self, text: str) -> None:
        """Print a line on this process, unless it was told before."""
        with self._lock:
            known = text in self._told
            self._told.add(text)
        if not known:
            self._own.print(text)


def _console(quiet: bool) -> Console:
    return Console(markup=False, highlight=False, soft_wrap=True, quiet=quiet)
