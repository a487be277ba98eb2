import math
from decimal import Context, Decimal, localcontext

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.method.schedule import Ramp, ScheduleConfig, learning_rate, steps_of, tau
from tests.helpers.golden_files import golden

IMAGENET = 1281167
CASES = [(40, 4096), (100, 4096), (300, 4096), (1000, 4096), (300, 256), (300, 1024)]


@pytest.mark.parametrize(("epochs", "batch"), CASES)
def test_official_schedules(epochs: int, batch: int) -> None:
    case = {
        key.split("/")[1]: array.tolist()
        for key, array in golden("schedules").items()
        if key.startswith(f"e{epochs}_b{batch}/")
    }
    base_lr, _, max_steps, warmup_steps, base_tau, *_ = case["config"]
    config = ScheduleConfig(epochs=epochs, base_lr=base_lr, base_tau=base_tau)
    total, warmup = config.total_steps(IMAGENET, batch), config.warmup_steps(IMAGENET, batch)
    peak = config.peak_lr(batch)
    assert (total, warmup) == (max_steps, warmup_steps)

    # 1e-6 of the peak: the official learning rate is float32 and cancels in the last steps.
    rates = [learning_rate(step, peak, warmup, total) for step in case["step"]]
    assert rates == pytest.approx(case["lr"], rel=0, abs=1e-6 * peak)
    assert rates == pytest.approx(case["lr_x64"], rel=0, abs=1e-6 * peak)
    taus = [tau(step, base_tau, total) for step in case["step"]]
    assert taus == pytest.approx(case["tau_x64"], rel=0, abs=1e-12)


def test_ends_and_peak() -> None:
    assert learning_rate(0, 3.2, 10, 100) == 0
    assert learning_rate(10, 3.2, 10, 100) == 3.2
    assert learning_rate(100, 3.2, 10, 100) == 0
    assert tau(0, 0.996, 100) == 0.996
    assert tau(100, 0.996, 100) == 1


def test_without_warmup() -> None:
    assert learning_rate(0, 3.2, 0, 100) == 3.2
    assert learning_rate(50, 3.2, 0, 100) == pytest.approx(1.6)


def test_without_decay_the_rate_stays() -> None:
    rates = [learning_rate(step, 3.2, 10, 100, decay="none") for step in (0, 5, 10, 55, 99, 100)]
    assert rates == [0, 1.6, 3.2, 3.2, 3.2, 3.2]
    ramp = Ramp(50, 10)  # after a branch at step 50
    assert learning_rate(55, 3.2, 10, 100, ramp, "none") == 1.6
    for step in range(11):  # the warm-up is the same
        assert learning_rate(step, 3.2, 10, 100, decay="none") == learning_rate(step, 3.2, 10, 100)


def test_run_shorter_than_its_warmup() -> None:
    rates = [learning_rate(step, 1.0, 10, 5) for step in range(7)]
    assert rates == [0, 0.1, 0.2, 0.3, 0.4, 0, 0]


def test_after_the_end() -> None:
    assert learning_rate(101, 3.2, 10, 100) == 0
    assert tau(101, 0.996, 100) == 1


def test_step_counts_are_exact() -> None:
    samples = 3**19  # quotients with long binary fractions
    for batch in (3, 7, 4096):
        assert ScheduleConfig(epochs=999).total_steps(samples, batch) == 999 * samples // batch
    assert ScheduleConfig(epochs=0.5).total_steps(1000, 8) == 62
    assert ScheduleConfig(warmup=0).warmup_steps(1000, 8) == 0


@given(st.integers(1, 10**6), st.integers(1, 10**7), st.integers(1, 2**14), st.integers(0, 3))
@example(736, 50_000, 256, 1)
def test_step_counts_are_those_of_the_number_that_was_written(
    digits: int, samples: int, batch: int, places: int
) -> None:
    """In decimal arithmetic; a product of floats is a step short for 73.6 epochs."""
    written = Decimal(digits).scaleb(-places)
    with localcontext(Context(prec=60)):
        expected = int(written * samples // batch)
    assert steps_of(float(str(written)), samples, batch) == expected
    assert ScheduleConfig(float(written)).total_steps(samples, batch) == expected
    assert ScheduleConfig(1, f"{written:f} epochs").warmup_steps(samples, batch) == expected


@given(st.integers(1, 10**6), st.integers(1, 10**7), st.integers(1, 2**14))
def test_a_recipe_may_compute_its_epochs(steps: int, samples: int, batch: int) -> None:
    assert steps_of(steps * batch / samples, samples, batch) == steps


def test_cosine_halfway() -> None:
    assert learning_rate(55, 1.0, 10, 100) == pytest.approx(0.5)
    assert 1 - tau(25, 0.9, 100) == pytest.approx(0.1 * (1 + math.sqrt(0.5)) / 2)


def test_linear_rule() -> None:
    """Twice the batch, twice the rate; or the paper batch's rate whatever the batch."""
    linear, fixed = ScheduleConfig(base_lr=0.2), ScheduleConfig(base_lr=0.2, lr_rule="fixed")
    assert [linear.peak_lr(batch) for batch in (256, 512, 4096)] == [0.2, 0.4, 3.2]
    assert [fixed.peak_lr(batch) for batch in (256, 4096)] == [3.2, 3.2]
    assert ScheduleConfig(lr_rule="fixed", paper_batch=512, base_lr=0.2).peak_lr(64) == 0.4


@pytest.mark.parametrize("batch", [512, 4096, 16384])
def test_power_rule_forgets_at_the_same_rate_for_each_image(batch: int) -> None:
    """What is left of the first target after 2**20 images does not depend on the batch."""
    config = ScheduleConfig(tau_rule="power")
    power = config.tau_power(batch)
    assert power == batch / 4096
    # Far from the schedule's end, where it is all but flat.
    left = math.prod(tau(step, 0.99, 10**9, power) for step in range(2**20 // batch))
    assert left == pytest.approx(0.99 ** (2**20 / 4096), rel=1e-6)


def test_power_rule_at_equal_times() -> None:
    for progress in (0, 0.25, 0.5, 1):
        whole = tau(round(1000 * progress), 0.996, 1000)
        assert tau(round(4000 * progress), 0.996, 4000, 0.25) == pytest.approx(whole**0.25)
    assert ScheduleConfig().tau_power(256) == 1
