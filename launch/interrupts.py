"""Let Ctrl-C end a command with one line while its imports run, which take seconds.

An exception would print a long traceback there, or get lost in a library that is being imported.
"""

import os
import signal
import sys
from types import FrameType


def end_plainly() -> None:
    """Have Ctrl-C end the process with status 130. Call it before the imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup and others ignore it
        signal.signal(signal.SIGINT, _end)


def restore() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again. Call it after the imports."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(_number: int, _frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        print("interrupted: the same command begins again", file=sys.stderr, flush=True)
    os._exit(130)
