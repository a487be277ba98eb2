"""The views' random parameters: frozen, rightly distributed, independent of the batch."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards.errors import InputError
from shards.fields import check_bounds
from shards.views import Column, ViewConfig, ViewDraws, ViewsConfig, crop_box, draw_views
from tests.helpers.places import GOLDEN

GOLDEN = GOLDEN / "views.npz"
MANY = np.arange(20_000)
FACTORS = slice(Column.FACTORS, Column.FACTORS + 4)
ORDER = slice(Column.ORDER, Column.ORDER + 4)


@pytest.fixture(scope="module")
def many() -> ViewDraws:
    return draw_views(11, 2, MANY, ViewsConfig())


def test_frozen() -> None:
    """The draws of released versions, bit for bit: a change here changes every run's views."""
    golden = np.load(GOLDEN)
    config = ViewsConfig()
    cases = zip(golden["seeds"].tolist(), golden["epochs"].tolist(), strict=True)
    for case, (seed, epoch) in enumerate(cases):
        draws = draw_views(seed, epoch, golden["ids"], config)
        assert draws.crop.dtype == np.float64
        assert draws.params.dtype == np.float32
        np.testing.assert_array_equal(draws.crop, golden["crop"][case])
        np.testing.assert_array_equal(draws.params, golden["params"][case])
        boxes = [
            [
                [crop_box(uniforms, height, width, config) for height, width in golden["sizes"]]
                for uniforms in view
            ]
            for view in draws.crop
        ]
        np.testing.assert_array_equal(boxes, golden["boxes"][case])


def test_a_row_depends_on_its_own_place_only() -> None:
    config = ViewsConfig()
    ids = np.array([9, 4, 2**40, 0, 77])
    together = draw_views(1, 5, ids, config)
    for position, sample in enumerate(ids):
        alone = draw_views(1, 5, np.array([sample]), config)
        np.testing.assert_array_equal(alone.crop[:, 0], together.crop[:, position])
        np.testing.assert_array_equal(alone.params[:, 0], together.params[:, position])
    backwards = draw_views(1, 5, ids[::-1], config)
    np.testing.assert_array_equal(backwards.params[:, ::-1], together.params)


def test_a_view_does_not_depend_on_the_other_ones_configuration() -> None:
    ids = np.arange(8)
    base = draw_views(1, 5, ids, ViewsConfig())
    other = draw_views(1, 5, ids, ViewsConfig(view1=ViewConfig(blur=0, solarize=0, flip=0)))
    np.testing.assert_array_equal(base.params[1], other.params[1])


def test_seed_epoch_and_view_matter() -> None:
    ids = np.arange(8)
    base = draw_views(1, 5, ids, ViewsConfig())
    for other in (draw_views(2, 5, ids, ViewsConfig()), draw_views(1, 6, ids, ViewsConfig())):
        assert (base.crop != other.crop).all()
        assert (base.params[..., FACTORS] != other.params[..., FACTORS]).all()
    assert (base.crop[0] != base.crop[1]).all()
    assert (base.params[0, :, FACTORS] != base.params[1, :, FACTORS]).all()


def test_probabilities(many: ViewDraws) -> None:
    def fraction(view: int, column: Column) -> float:
        return float((many.params[view, :, column] > 0).mean())

    expected = {
        Column.FLIP: (0.5, 0.5),
        Column.JITTER: (0.8, 0.8),
        Column.GRAYSCALE: (0.2, 0.2),
        Column.SOLARIZE: (0.0, 0.2),
        Column.SIGMA: (1.0, 0.1),
    }
    for column, chances in expected.items():
        for view, chance in enumerate(chances):
            spread = math.sqrt(chance * (1 - chance) / len(MANY))
            assert abs(fraction(view, column) - chance) <= 4 * spread, column


def test_ranges(many: ViewDraws) -> None:
    for view in many.params:
        sigma = view[:, Column.SIGMA]
        columns = [*view[:, FACTORS].T, sigma[sigma > 0]]
        ranges = [(-0.4, 0.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
        for values, (low, high) in zip(columns, ranges, strict=True):
            _assert_uniform(values.astype(np.float64), low, high)


def test_every_order_is_as_likely(many: ViewDraws) -> None:
    orders = many.params[..., ORDER].reshape(-1, 4).astype(int)
    digits = orders @ (1000, 100, 10, 1)
    counts = [(digits == np.dot(p, (1000, 100, 10, 1))).sum() for p in permutations(range(4))]
    assert sum(counts) == len(orders)
    expected = len(orders) / 24
    assert sum((count - expected) ** 2 / expected for count in counts) < 60  # p = 4e-5


def test_draws_are_independent(many: ViewDraws) -> None:
    columns = np.concatenate(
        [*many.crop.swapaxes(1, 2), *many.params[..., : Column.ORDER].swapaxes(1, 2)]
    )  # [columns, B]
    varied = columns[columns.std(axis=1) > 0]  # view 1 is never solarized
    correlation = np.corrcoef(varied) - np.eye(len(varied))
    assert len(varied) == 23
    assert np.abs(correlation).max() < 5 / math.sqrt(len(MANY))


def test_crop_distribution(many: ViewDraws) -> None:
    config = ViewsConfig(area=(0.08, 0.5))  # small enough that no side is ever clamped
    side = 100_000
    boxes = np.array([crop_box(u, side, side, config) for u in many.crop[0]], np.float64)
    top, left, height, width = boxes.T
    _assert_uniform(height * width / side**2, 0.08, 0.5)
    _assert_uniform(np.log(width / height), math.log(3 / 4), math.log(4 / 3))
    _assert_uniform(top / (side - height), 0, 1)
    _assert_uniform(left / (side - width), 0, 1)


def test_crop_by_hand() -> None:
    config = ViewsConfig(area=(0.25, 0.25), ratio=(1, 1))
    last = 1 - 2.0**-32
    assert crop_box(np.array([0, 0, 0, 0.0]), 5, 5, config) == (0, 0, 2, 2)  # 2.5 to even
    assert crop_box(np.array([0, 0, last, last]), 7, 7, config) == (3, 3, 4, 4)  # 3.5 to even
    wide = ViewsConfig(area=(1, 1), ratio=(4, 4))
    assert crop_box(np.array([0, 0, last, last]), 10, 10, wide) == (5, 0, 5, 10)  # clamped
    tiny = ViewsConfig(area=(1e-6, 1e-6))
    assert crop_box(np.array([0, 0, last, 0]), 8, 9, tiny) == (7, 0, 1, 1)  # at least a pixel


_words = st.integers(0, 2**32 - 1)
_sides = st.integers(1, 20_000)


@given(st.tuples(_words, _words, _words, _words), _sides, _sides, st.booleans())
def test_box_lies_inside_the_image(
    words: tuple[int, int, int, int], height: int, width: int, extreme: bool
) -> None:
    config = ViewsConfig(area=(1e-9, 1.0), ratio=(1e-4, 1e4)) if extreme else ViewsConfig()
    top, left, box_height, box_width = crop_box(np.array(words) * 2.0**-32, height, width, config)
    assert top >= 0
    assert left >= 0
    assert box_height >= 1
    assert box_width >= 1
    assert top + box_height <= height
    assert left + box_width <= width


def test_impossible_settings_are_refused() -> None:
    for config, text in (
        (ViewConfig(blur=1.1, solarize=0), "blur must be from 0 to 1, not 1.1"),
        (ViewConfig(blur=1, solarize=math.nan), "solarize must be from 0 to 1, not nan"),
        (ViewConfig(blur=1, solarize=0, blur_sigma=(0, 1)), "blur_sigma must be more than 0"),
        (ViewsConfig(area=(0.5, 0.1)), "area must be two rising numbers"),
        (ViewsConfig(area=(0.5, 1.1)), "area must be at most 1"),
        (ViewsConfig(size=0), "size must be from 1"),
        (ViewsConfig(ratio=(0, 1)), "ratio must be more than 0"),
        (ViewsConfig(view2=ViewConfig(blur=0, solarize=2)), "view2.solarize must be"),
    ):
        with pytest.raises(InputError, match=f"^{text}"):
            check_bounds(config)


def test_ever_blur() -> None:
    sharp = ViewConfig(blur=0, solarize=0.2)
    assert ViewsConfig().ever_blur
    assert ViewsConfig(view1=sharp).ever_blur
    assert not ViewsConfig(view1=sharp, view2=sharp).ever_blur


def _assert_uniform(values: NDArray[np.float64], low: float, high: float) -> None:
    width = high - low
    slack = 1e-4 * width  # rounding: of float32, of a crop to whole pixels
    assert low - slack <= values.min() < low + 0.01 * width
    assert high - 0.01 * width < values.max() <= high + slack
    assert abs(values.mean() - (low + high) / 2) < 4 * width / math.sqrt(12 * len(values))
    # The variance of n uniform values has standard error width^2 / sqrt(180 n).
    assert abs(values.var() - width**2 / 12) < 4 * width**2 / math.sqrt(180 * len(values))
