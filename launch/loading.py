"""Say at once that a command has begun, because its imports take from seconds to a minute."""

import os
import sys


def say_loading() -> None:
    """Print a line where a person watches: on the first process, on a terminal, and not for help.

    Logs and scripts get nothing, so what they read from stderr stays what it was.
    """
    watched = sys.stderr is not None and sys.stderr.isatty()
    if watched and os.environ.get("RANK", "0") == "0" and not {"-h", "--help"} & set(sys.argv):
        print("loading torch and the engine", file=sys.stderr, flush=True)
