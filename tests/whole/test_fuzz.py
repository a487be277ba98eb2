"""The short form of fuzz.py, and that it can fail."""

import random
import time

from shards.errors import InputError
from tests.whole import fuzz
from tests.whole.fuzz import Target, feed, run_apart
from tests.whole.fuzz_inputs import damage


def test_damaged_files_are_refused_or_read() -> None:
    table, faults = run_apart(400, 0)
    assert not faults, "\n".join([table, *faults[:10]])
    accepted, refused = (
        sum(int(row.split()[column]) for row in table.splitlines()[1:-1]) for column in (-4, -3)
    )
    assert accepted + refused == 400
    assert refused > 100


def _target(error: BaseException | None, seconds: float = 0.0) -> Target:
    def read(_: bytes) -> None:
        time.sleep(seconds)
        if error is not None:
            raise error

    return Target(read, lambda _: b"a", lambda content, _: content, InputError)


def test_other_outcomes_are_failures() -> None:
    assert feed(_target(None), b"") == ""
    assert feed(_target(InputError("a")), b"") == ""
    assert feed(_target(KeyError("a")), b"") == "KeyError: 'a'"
    assert feed(_target(MemoryError()), b"") == "MemoryError: "
    assert "the text" in feed(_target(InputError("a" * 3000)), b"")
    fuzz.SECONDS, before = 0.05, fuzz.SECONDS
    try:
        assert feed(_target(None, 5), b"") == "took more than 0.05 s"
    finally:
        fuzz.SECONDS = before


def test_damage_is_a_function_of_the_seed() -> None:
    whole = bytes(range(256))
    damaged = [damage(whole, random.Random(seed)) for seed in range(100)]
    assert damaged == [damage(whole, random.Random(seed)) for seed in range(100)]
    assert len(set(damaged)) > 90
