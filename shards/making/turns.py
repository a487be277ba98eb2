"""Work on large images one at a time, to bound the memory.

They have a thread of their own, because the C library keeps what was freed for each thread that
allocated it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

LARGE = 16_000_000  # in pixels

_T = TypeVar("_T")

_thread = ThreadPoolExecutor(1, thread_name_prefix="large")


def take_turn(pixels: int, call: Callable[[], _T]) -> _T:
    """Call `call`. When it is for an image of many pixels, wait until no other one is worked on."""
    return _thread.submit(call).result() if pixels > LARGE else call()
