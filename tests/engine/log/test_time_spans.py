"""Spans of time, as the log, the progress and the list of runs show them."""

import pytest

from engine.log.time_spans import show_span


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.4, "0 s"), (59.9, "59 s"), (119, "1 min 59 s"), (3600, "1 h 0 min")),
        *((3660, "1 h 1 min"), (86_399, "23 h 59 min"), (90_000, "1 d 1 h"), (1e7, "115 d 17 h")),
    ],
)
def test_two_units_are_shown(seconds: float, text: str) -> None:
    assert show_span(seconds) == text
