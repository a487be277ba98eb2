"""The time that a training still takes: steady, and right, whatever stalls."""

import pytest
from rich.console import Console
from rich.progress import Progress

from engine.log import remaining
from engine.log.remaining import RECENT, Remaining, TimeLeftColumn
from tests.engine.log.test_progress import Clock

STOP, EVERY = 1000, 10  # steps, and those from one logged step to the next


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(remaining, "time", made)
    return made


def train(
    clock: Clock, pace: list[float], evaluation: float, probe_every: int, stalls: dict[int, float]
) -> tuple[list[float | None], list[float]]:
    """Return what is estimated after each logged step, and how long it really takes then."""
    shown, estimated, times = Remaining(STOP), list[float | None](), list[float]()
    for step in range(1, STOP + 1):
        clock.now += pace[step - 1] + stalls.get(step, 0)
        evaluated = step % probe_every == 0
        clock.now += evaluation * evaluated
        if step % EVERY == 0 or step == 1 or evaluated:
            shown.note(step, evaluated)
            estimated.append(shown.seconds(step))
            times.append(clock.now)
    return estimated, [clock.now - time for time in times]


@pytest.mark.parametrize("probe_every", [10, 35, 50])
def test_a_steady_training_is_estimated_from_its_second_evaluation_on(
    clock: Clock, probe_every: int
) -> None:
    """With the time of its evaluations, and without what only the first step takes."""
    pace = [200.0] + [0.5] * (STOP - 1)
    estimated, true = train(clock, pace, 7.0, probe_every, {})
    assert estimated[0] is None
    later = slice(2 * probe_every // EVERY + 3, -15)
    assert len(true[later]) > 50
    for found, wanted in zip(estimated[later], true[later], strict=True):
        assert found == pytest.approx(wanted, rel=0.25)
    assert estimated[-1] == 0


def test_a_stall_moves_nothing_and_a_lasting_change_counts(clock: Clock) -> None:
    usual, true = train(clock, [0.5] * STOP, 7.0, 50, {})
    stalled, _ = train(clock, [0.5] * STOP, 7.0, 50, {205: 900.0, 250: 900.0})
    for found, wanted in zip(stalled[1:], usual[1:], strict=True):
        assert found == pytest.approx(wanted, rel=0.01)
    slower, true = train(clock, [0.5] * 400 + [1.5] * 600, 7.0, 50, {})
    at = 1 + 40 + RECENT // 2 * 5 // 4 + 2  # one logged step in five is an evaluation
    assert slower[at] == pytest.approx(true[at], rel=0.15)


def test_the_text_is_short(clock: Clock) -> None:
    shown = Remaining(5000)
    shown.note(1, evaluated=False)
    assert shown.text(1) == ""
    clock.now += 9.0
    shown.note(10, evaluated=False)
    assert [shown.text(step) for step in (0, 1000, 1401, 4815, 5000, 6000)] == [
        *("1 h 23 min", "1 h 6 min", "59 min 59 s", "3 min 5 s", "0 s", "0 s")
    ]
    bars = Progress(TimeLeftColumn(shown), console=Console(width=99))
    bars.add_task("train", total=5000, completed=4815)
    with bars.console.capture() as captured:
        bars.console.print(bars.make_tasks_table(bars.tasks))
    assert captured.get().strip() == "left 3 min 5 s"
