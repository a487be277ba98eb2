"""Retry requests to a store: how often, how long, and which failures are final."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from shards.storage import outages
from shards.storage.failures import explain
from shards.storage.local_files import is_local, tell_obstacle
from shards.storage.redaction import redact

_T = TypeVar("_T")

ATTEMPTS = 8
CONTENT_ATTEMPTS = 4  # This many tries are made when an answer comes but has wrong content.
BRIEF_ATTEMPTS = 4  # This many are made of what hardly passes, such as expired credentials.
BACKOFF = 0.2  # Seconds before the first retry, with jitter. The wait doubles each time.
LONGEST_WAIT = 10.0  # The most seconds between two tries, before jitter.
TRY_FOR = 120.0  # No new try begins after this many seconds.


class WrongLength(OSError):
    """A read returned a different number of bytes than was asked for: the object ends early."""


def retry(url: str, call: Callable[[], _T]) -> _T:
    """Call `call` until it succeeds, and return its result.

    Raises OSError, or a subclass, naming `url`, at once when a retry can't help, and otherwise
    after ATTEMPTS tries, after CONTENT_ATTEMPTS wrong lengths, after BRIEF_ATTEMPTS failures that
    hardly pass, or when TRY_FOR seconds are over. On a local disk, errors such as FileNotFoundError
    are raised unchanged.
    """
    begun, wrong, brief = time.monotonic(), 0, 0
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:  # The errors of botocore and aiohttp are not OSErrors.
            failure = explain(error, url)
            if is_local(url) and isinstance(error, NotADirectoryError):
                raise tell_obstacle(error) from None
            if is_local(url) and failure.kind is not OSError:
                raise
            short = isinstance(error, WrongLength)
            wrong, brief = wrong + short, brief + failure.brief
            kind = WrongLength if short else failure.kind
            spent = time.monotonic() - begun
            last = attempt == ATTEMPTS or spent > TRY_FOR
            last = last or wrong == CONTENT_ATTEMPTS or brief == BRIEF_ATTEMPTS
            if failure.hopeless or (short and is_local(url)):
                raise kind(f"{redact(url)}: {failure.reason}") from None
            if last:
                tries = f"gave up after {attempt} tries in {spent:.0f} s"
                raise kind(f"{redact(url)}: {tries}: {failure.reason}") from None
            if not is_local(url):
                outages.note(url, failure.reason, spent, TRY_FOR)
        pause(attempt)
    raise AssertionError("unreachable")


def pause(attempt: int) -> None:
    """Wait before the next try. The wait grows with each attempt and has random jitter.

    Args:
        attempt: Number of the try that has just failed, counted from 1.
    """
    wait = min(BACKOFF * 2 ** (attempt - 1), LONGEST_WAIT)
    time.sleep(wait * random.uniform(0.5, 1.5))
