"""Many calls in threads: in order, bounded, and ended by a failure."""

import time
from collections.abc import Iterator
from threading import Event

import pytest

from shards.threads import map_ahead, run_in_threads


def test_results_are_in_order_and_bounded() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    found = map_ahead(lambda number: number * number, items(), threads=3, ahead=4)
    assert taken == []  # nothing begins before the first result is asked for
    for number, square in enumerate(found):
        assert square == number * number
        assert len(taken) == min(20, number + 5)


@pytest.mark.parametrize("fails", [True, False])
def test_no_call_begins_after_the_end(fails: bool) -> None:
    begun: list[int] = []

    def call(number: int) -> int:
        begun.append(number)
        if number == 1 and fails:
            raise OSError("no more")
        if number:
            time.sleep(0.1)
        return number

    found = map_ahead(call, range(40), threads=2, ahead=39)
    assert next(found) == 0
    if fails:
        with pytest.raises(OSError, match="no more"):
            next(found)
    found.close()
    assert len(begun) < 40
    assert list(found) == []


def test_a_failure_ends_the_others() -> None:
    stop = Event()

    def call(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        stop.wait(10)
        return number

    with pytest.raises(ValueError, match="three"):
        run_in_threads(call, [3, *range(50)], threads=2, stop=stop)
    assert stop.is_set()
    assert run_in_threads(str, range(5), threads=2) == ["0", "1", "2", "3", "4"]
