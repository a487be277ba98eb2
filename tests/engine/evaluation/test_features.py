"""Accuracies are those of plain counting."""

import pytest
import torch

from engine.evaluation.features import Accuracy, measure_accuracy
from engine.evaluation.results import list_metrics, show_chosen
from engine.processes import world
from shards.errors import InputError
from tests.engine.evaluation.test_linear import ALONE
from tests.helpers.ranks import Ranks

# Of class 0 all 8 are right, of class 1 one of 2, of class 3 none of 1; 2 and 4 do not occur.
LABELS = torch.tensor([0] * 8 + [1, 1, 3])
SCORES = torch.eye(5)[torch.tensor([0] * 8 + [1, 0, 2])]


def measure_part(cuts: list[int]) -> Accuracy:
    here = world.join(1, False)
    part = slice(cuts[here.rank], cuts[here.rank + 1])
    return measure_accuracy(SCORES[part], LABELS[part], here, "data.val")


def test_each_class_counts_alike(ranks: Ranks) -> None:
    """On each process, one of which has no row."""
    expected = measure_part([0, 11])
    assert expected == pytest.approx((9 / 11, 1.0, 11, (1 + 0.5 + 0) / 3))
    assert ranks.run(measure_part, [0, 9, 9, 11], size=3) == [expected] * 3


def test_classes_of_equal_numbers_have_no_mean() -> None:
    assert measure_accuracy(SCORES[6:10], LABELS[6:10], ALONE, "data.val") == (0.75, 1.0, 4, None)


def test_a_score_of_minus_infinity_is_never_right() -> None:
    scores = torch.full((1, 6), -torch.inf)
    assert measure_accuracy(scores, torch.tensor([0]), ALONE, "data.val") == (0.0, 0.0, 1, None)


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(InputError, match=r"no labeled image that can be decoded: see data\.val"):
        measure_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), ALONE, "data.val")


def test_what_tells_nothing_is_not_listed() -> None:
    even, uneven = Accuracy(0.5, 0.9, 10), Accuracy(0.5, 0.9, 10, 0.4)
    assert list_metrics(even, 5, "x_{}".format) == {"x_top1": 0.5}
    assert list_metrics(even, 6, "x_{}".format) == {"x_top1": 0.5, "x_top5": 0.9}
    assert list_metrics(uneven, 5, "x_{}".format) == {"x_top1": 0.5, "x_mean_class": 0.4}
    assert show_chosen(uneven, True, 5) == {"top-1": 0.5, "mean of classes": 0.4}
    assert show_chosen(uneven, False, 5) == {"top-1": "", "mean of classes": ""}
