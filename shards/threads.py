"""Call a function on many items in threads, with the results in the order of the items."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_threads(
    call: Callable[[Item], Result], items: Iterable[Item], threads: int, stop: Event | None = None
) -> list[Result]:
    """Call `call` on every item, and return all results.

    After an exception no new call begins, and `stop` is set, so that long calls can end early.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="call") as pool:
        try:
            return list(pool.map(call, items))
        except BaseException:
            if stop is not None:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def map_ahead(
    call: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Yield the result of `call` for each item, while others are computed ahead of need.

    After an exception, or when the generator is closed, no new call begins.

    Args:
        ahead: Number of items that are in the threads or done, besides the one that is yielded.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(call, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
