"""Prepare a process for its imports, which take seconds, and undo that after them.

Ctrl-C ends the process with one line meanwhile. An exception would print a long traceback there, or
get lost in a library that is being imported.

Python's garbage collector is off meanwhile. Imports make half a million objects that stay, and it
would look through all of them again and again, for a sixth of the time. After that it leaves them
out for good. A process of many may so not be the one that the others wait for in a step.
"""

import atexit
import gc
import os
import signal
import sys
from types import FrameType

from launch.loading import say_loading
from launch.plain_output import prepare_output
from launch.requirements import check_requirements


def begin() -> None:
    """Have Ctrl-C end the process with status 130, and turn the garbage collector off.

    Say that imports take a while, end the process when a package is missing or too old, and let
    standard output take any text.
    """
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup and others ignore it
        signal.signal(signal.SIGINT, _end)
    say_loading()
    check_requirements()
    prepare_output()


def end() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, and have new garbage alone collected."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()
    gc.enable()
    # Libraries count what is still there at the exit, and print pages about it.
    atexit.register(gc.unfreeze)


def _end(_number: int, _frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        print("interrupted: the same command begins again", file=sys.stderr, flush=True)
    os._exit(130)
