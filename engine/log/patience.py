"""Try what may fail or take long, where the rest must go on whatever becomes of it."""

import threading
import time
from collections.abc import Callable

LOOK = 0.1  # seconds between two looks whether to leave a call
_NAME = "trial"  # of the threads


def try_for(
    seconds: float, call: Callable[[], object], leave: threading.Event | None = None
) -> str:
    """Make a call in a thread, and return "" when it succeeds in time, else why it did not.

    A call that takes longer goes on beside the rest, and ends with the process at the latest.

    Args:
        leave: Is set when nobody waits for the call any more.
    """
    faults: list[str] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # of whatever kind
            faults.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=run, name=_NAME, daemon=True)
    thread.start()
    end = time.monotonic() + seconds
    while thread.is_alive() and (left := end - time.monotonic()) > 0:
        thread.join(left if leave is None else min(left, LOOK))
        if thread.is_alive() and leave is not None and leave.is_set():
            return "a signal came first"
    if thread.is_alive():
        return f"it takes more than {seconds:g} s"
    return faults[0] if faults else ""


def is_trying() -> bool:
    """Return whether a call that took too long still goes on.

    Python's normal exit would wait for the threads that the call may have started.
    """
    return any(thread.name == _NAME for thread in threading.enumerate())
