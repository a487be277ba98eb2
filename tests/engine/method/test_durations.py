"""Durations: steps and epochs mean the same everywhere, and what is none is told in one line."""

from fractions import Fraction
from typing import Any

import pytest

from engine.evaluation.during_training import ProbeConfig
from engine.log.metrics import LogConfig
from engine.method.durations import Lasting, is_due, parse, to_steps
from engine.method.schedule import ScheduleConfig, steps_of
from engine.state.checkpoint import CheckpointConfig
from shards.errors import InputError


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        (300, 300, "step"),
        ("300", 300, "step"),
        ("500 steps", 500, "step"),
        ("1 step", 1, "step"),
        ("1epoch", 1, "epoch"),
        (" 0.5  Epochs ", Fraction(1, 2), "epoch"),
        (".25 epochs", Fraction(1, 4), "epoch"),
        ("1/3 epoch", Fraction(1, 3), "epoch"),
    ],
)
def test_durations_are_read(text: int | str, number: Any, unit: str) -> None:
    assert parse(text) == (number, unit)


@pytest.mark.parametrize(
    "value",
    ["", "epoch", "one epoch", "-1 epochs", "1 epoch 2", "1e3", "inf epochs", "1/0 epochs", 1.5],
)
def test_what_is_no_duration_is_told(value: Any) -> None:
    with pytest.raises(InputError, match=r"^probe.every takes a number of steps or of epochs, "):
        Lasting().check("probe.every", value)
    assert ProbeConfig(every=value).every == value  # the recipe's check reports it


@pytest.mark.parametrize("value", [0, "0", "0 epochs", "0.0 steps"])
def test_zero_turns_off(value: int | str) -> None:
    assert not ProbeConfig(every=value).every
    assert not any(CheckpointConfig(every=value).due(step) for step in range(20))
    Lasting().check("probe.every", value)
    with pytest.raises(InputError, match=r"log\.every must be more than 0, not"):
        Lasting(positive=True).check("log.every", value)


def test_the_same_duration_is_written_in_one_way() -> None:
    for value in ("1epoch", "1.0 epochs", "01 Epochs", "2/2 epochs"):
        assert LogConfig(every=value).every == "1 epoch"
    assert LogConfig(every="300 steps").every == 300
    assert ScheduleConfig(warmup="0.50 epoch").warmup == "0.5 epochs"
    assert ScheduleConfig(warmup="1/3 epochs").warmup == "1/3 epochs"
    third = "0.3333333333333333 epochs"
    assert ScheduleConfig(warmup=third).warmup == third


@pytest.mark.parametrize(
    "text", [f"0.{'3' * 30} epochs", f"{10**15 - 1}.{'7' * 30} epochs", "1/3 epochs"]
)
def test_what_is_written_for_a_duration_can_be_read(text: str) -> None:
    Lasting().check("schedule.warmup", text)
    written = ScheduleConfig(warmup=text).warmup
    assert parse(written) == (Fraction(text.split()[0]), "epoch")
    assert ScheduleConfig(warmup=written).warmup == written
    every = to_steps(written, 5004)
    assert LogConfig(every=every).every == every
    assert not is_due(every, 1)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("100000000000000000000000000001/7 epochs", "must be at most 1,000,000,000,000,000, not"),
        (10**16, "must be at most 1,000,000,000,000,000, not"),
        (f"{10**15}.5 steps", "must be at most 1,000,000,000,000,000, not"),
        (f"0.{'3' * 31} epochs", "takes at most 30 digits after the point, not"),
        (f"1/{10**30 + 1} epochs", "takes at most 30 digits after the point, not"),
        ("9" * 99, "must be at most 1,000,000,000,000,000, not"),
        ("9" * 10**6, "takes a number of steps or of epochs, "),
    ],
)
def test_a_duration_that_is_too_long_or_too_fine_is_told(value: int | str, fault: str) -> None:
    with pytest.raises(InputError, match=rf"^log\.every {fault}") as error:
        Lasting().check("log.every", value)
    assert len(str(error.value)) < 300
    assert LogConfig(every=value).every == value  # the recipe's check reports it
    with pytest.raises(ValueError, match=r"."):
        to_steps(value, 5004)


def test_a_duration_of_more_steps_than_can_be_given_is_read_too() -> None:
    every = to_steps(f"{10**15} epochs", 5004)
    assert every == 10**15
    assert not is_due(every, 10**9)


@pytest.mark.parametrize("steps_per_epoch", [1, 6, 7, 313])
@pytest.mark.parametrize("number", [Fraction(1, 10), Fraction(1, 3), Fraction(1, 2), 1, 2, 20])
def test_what_happens_by_epochs_hits_their_ends(number: Fraction, steps_per_epoch: int) -> None:
    """It happens after the first step that ends its k-th part, and at most once a step."""
    every = to_steps(f"{number} epochs", steps_per_epoch)
    last = 60 * steps_per_epoch
    found = [step for step in range(1, last + 1) if is_due(every, step)]
    ends = {-(-k * number * steps_per_epoch // 1) for k in range(1, int(60 / number) + 1)}
    assert found == sorted(ends)
    assert set(range(20 * steps_per_epoch, last, 20 * steps_per_epoch)) <= set(found)


def test_epochs_are_never_taken_for_steps() -> None:
    with pytest.raises(ValueError, match="must be turned to steps"):
        is_due("1 epoch", 1)


def test_the_warm_up_counts_as_before() -> None:
    for epochs in (0.5, 1, 10, 73.6, 20 * 16 / 104):
        before = steps_of(epochs, 50_000, 256)
        assert ScheduleConfig(warmup=f"{epochs} epochs").warmup_steps(50_000, 256) == before
    assert ScheduleConfig(warmup=300).warmup_steps(50_000, 256) == 300
    assert ScheduleConfig().warmup_steps(1_281_167, 4096) == 10 * 1_281_167 // 4096
