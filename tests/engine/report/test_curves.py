"""Curves: thinned without losing extremes, finite in all places, with axes that tell apart."""

import re
from typing import Any

import numpy as np
import pytest

from engine.report.charts import read_baselines
from engine.report.curves import COLUMNS, HEIGHT, WIDTH, Series, draw_chart, shorten, show_number
from engine.report.facts import RunFacts, as_number
from engine.report.html import Html
from engine.report.thinning import average, thin


def chart(values: list[float], key: str = "loss") -> Html | None:
    steps = np.arange(1, len(values) + 1, dtype=float)
    return draw_chart(key, "A title", [Series("run", 0, steps, np.array(values, float))])


def places(svg: str) -> list[tuple[float, float]]:
    """All points of the drawn curves."""
    paths = re.findall(r'<path class="[^"]*" d="([^"]*)"', svg)
    numbers = r"([-\d.]+) ([-\d.]+)"
    return [(float(x), float(y)) for path in paths for x, y in re.findall(numbers, path)]


def test_a_short_curve_keeps_all_its_points() -> None:
    steps, values = np.arange(5.0), np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    assert thin(steps, values, 0, 4, 100) == [list(zip(steps, values, strict=True))]


def test_a_long_curve_keeps_its_extremes_and_is_bounded() -> None:
    count = 100_000
    values = np.random.default_rng(0).normal(size=count)
    values[40_123], values[70_001] = 50, -60  # outliers of one step each
    (points,) = thin(np.arange(count, dtype=float), values, 0, count - 1, COLUMNS)
    assert len(points) <= 4 * (COLUMNS + 1)
    assert {(40_123.0, 50.0), (70_001.0, -60.0)} <= set(points)
    assert points[0] == (0.0, values[0])
    assert points[-1] == (count - 1, values[-1])
    assert points == sorted(points)
    # The picture is that of the whole curve: in each column the same range.
    column = np.arange(count) * COLUMNS // (count - 1)
    for c in (0, 17, COLUMNS - 1):
        kept = [y for x, y in points if int(x / (count - 1) * COLUMNS) == c]
        assert (min(kept), max(kept)) == (values[column == c].min(), values[column == c].max())


def test_a_long_curve_shows_its_mean_before_its_range() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    (points,) = average(np.arange(10_000.0), values, 0, 10_000, 100)
    assert np.allclose([y for _, y in points], values.reshape(100, 100).mean(axis=1))
    assert str(chart(values.tolist())).count("<path") == 2
    assert str(chart(values[:100].tolist())).count("<path") == 1


def test_a_single_point_is_a_dot() -> None:
    nan = float("nan")
    assert re.findall('class="(curve[^"]*)"', str(chart([0.5]))) == ["curve s0 first dot"]
    found = re.findall('class="(curve[^"]*)"', str(chart([0.5, nan, 1, 2])))
    assert found == ["curve s0 first", "curve s0 first dot"]


def test_a_curve_is_broken_where_nothing_is_finite() -> None:
    nan = float("nan")
    found = thin(np.arange(6.0), np.array([1, nan, nan, 2, 3, nan]), 0, 5, 100)
    assert found == [[(0, 1)], [(3, 2), (4, 3)]]
    long = np.ones(10_000)
    long[3000:6000] = nan
    assert len(thin(np.arange(10_000.0), long, 0, 9999, 100)) == 2


@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [5.0, 5.0],
        [-1e99, 1e99],
        [1e-99, 1e99, 1.0],
        [1e-99, 2e-99],
        [0.9960001, 0.9960002],
        [float("nan"), 1.0, float("nan")],
        [1, 1, 1, 1, 1e6],
        [-3, -2, -1],
        list(range(10_000)),
    ],
)
def test_every_point_lies_in_the_picture(values: list[float]) -> None:
    svg = chart(values)
    assert svg
    assert "nan" not in svg.replace("not finite", "")
    assert "inf" not in svg.replace("not finite", "")
    assert len(places(svg)) >= min(len(values), 2)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places(svg))


def test_nothing_finite_is_no_chart() -> None:
    assert chart([float("nan")] * 3) is None
    assert draw_chart("loss", "A title", []) is None


def test_a_wide_curve_is_logarithmic_and_says_so() -> None:
    assert "logarithmic" in str(chart([1, 1, 1, 1, 1e6], "grad_norm"))
    assert "logarithmic" not in str(chart([1, 2, 3, 4, 5], "grad_norm"))


def test_what_is_not_finite_is_counted() -> None:
    assert "2 not finite" in str(chart([1, float("nan"), 2, float("nan")]))


def test_ticks_tell_from_each_other() -> None:
    svg = str(chart([0.98910, 0.98935, 0.98921], "feature_std"))
    labels = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert len(labels) >= 3
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.12345, "0.123"),
        (999, "999"),
        (1234, "1,234"),
        (56_000, "56k"),
        (2.5e7, "25M"),
        (1e6, "1M"),
        (999_999, "1000k"),
        (2e-7, "2e-7"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert shorten(value) == text


def test_fractions_are_percentages() -> None:
    assert show_number("knn_top1", 0.5) == show_number("data_wait", 0.5) == "50.0%"
    assert show_number("loss", 0.5) == "0.5"
    assert show_number("loss", float("nan")) == "not finite"


def test_logged_values_are_read_whatever_they_are() -> None:
    assert as_number("text") is as_number(True) is None
    assert as_number(10**400) == float("inf")
    assert as_number(1e-200) == 0
    records: list[dict[str, Any]] = [
        {"step": 1, "loss": None},
        {"step": 2, "loss": 2.5},
        {"step": 3, "loss": "a"},
    ]
    steps, values = RunFacts("run", records=records).numbers("loss")
    assert steps.tolist() == [1, 2]
    assert np.isnan(values[0])
    assert values[1] == 2.5


def test_every_baseline_has_a_level() -> None:
    """Also that of a run which began with given weights."""
    run = RunFacts("run", records=[{"step": 0, "knn_start": 0.5, "knn_pixels": 0.25}])
    assert read_baselines(run) == {"raw pixels": 0.25, "start weights": 0.5}
