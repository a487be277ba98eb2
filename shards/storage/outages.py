"""Say once in an outage that a store does not do what it should, and that it is tried again."""

import sys
import threading
import time

from shards.errors import printable
from shards.storage.redaction import redact

QUIET = 5.0  # Nothing is said of requests that have been tried for less than so many seconds.
PAUSE = 120.0  # After so many seconds without a failure, the next one is another outage.

_failed: dict[str, float] = {}  # when a store failed last, by its name
_lock = threading.Lock()


def note(url: str, reason: str, spent: float, longest: float) -> None:
    """Note that a request failed and is tried again, and say so on stderr if nobody knows yet.

    Args:
        reason: One line without secrets.
        spent: Seconds since the request was tried first.
        longest: No new try begins after so many seconds.
    """
    if spent < QUIET:
        return
    scheme, mark, place = redact(url).partition("://")
    store = f"{scheme}{mark}{place.partition('/')[0]}"
    with _lock:
        now = time.monotonic()
        known = store in _failed and now - _failed[store] < PAUSE
        _failed[store] = now
    if not known:
        text = f"{store}: a request is tried again, for up to {longest:g} s: {reason}"
        print(printable(text), file=sys.stderr, flush=True)
