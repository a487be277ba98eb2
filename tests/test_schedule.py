import math

import pytest

from engine.schedule import ScheduleConfig, learning_rate, tau
from tests.golden_files import golden

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
    assert ScheduleConfig(warmup_epochs=0).warmup_steps(1000, 8) == 0


def test_cosine_halfway() -> None:
    assert learning_rate(55, 1.0, 10, 100) == pytest.approx(0.5)
    assert 1 - tau(25, 0.9, 100) == pytest.approx(0.1 * (1 + math.sqrt(0.5)) / 2)
