"""Try what may fail or take long, where the rest must go on whatever becomes of it."""

import threading
from collections.abc import Callable


def try_for(seconds: float, call: Callable[[], object]) -> str:
    """Make a call in a thread, and return "" when it succeeds in time, else why it did not.

    A call that takes longer goes on beside the rest, and ends with the process at the latest.
    """
    faults: list[str] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # of whatever kind
            faults.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=run, name="trial", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"it takes more than {seconds:g} s"
    return faults[0] if faults else ""
