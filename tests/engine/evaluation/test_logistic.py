"""The logistic regression is that of Newton's method in NumPy, on one process and on several."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from engine.evaluation.features import Accuracy, Features
from engine.evaluation.logistic import LogisticConfig, fit, measure
from engine.processes import world
from tests.engine.evaluation.test_linear import ALONE, CLASSES, WIDTH, clouds
from tests.helpers.ranks import Ranks

Values = NDArray[np.float64]


def newton(x: Values, labels: NDArray[np.int64], strength: float) -> Values:
    """The weights and biases [C, F + 1] of the penalized sum's minimum, in float64."""
    rows = np.hstack([x, np.ones((len(x), 1))])
    wanted = np.eye(CLASSES)[labels]
    penalty = np.append(np.full(WIDTH, strength), 0.0)  # none for the bias
    theta = np.zeros((CLASSES, WIDTH + 1))
    for _ in range(40):
        logits = rows @ theta.T
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        gradient = (share - wanted).T @ rows + penalty * theta
        hessian = np.einsum("nc,cd,nf,ng->cfdg", share, np.eye(CLASSES), rows, rows)
        hessian -= np.einsum("nc,nd,nf,ng->cfdg", share, share, rows, rows)
        size = theta.size
        whole = hessian.reshape(size, size) + np.diag(np.tile(penalty, CLASSES))
        # Biases that move together change nothing, so that the Hessian has no inverse.
        theta -= np.linalg.lstsq(whole, gradient.ravel(), rcond=None)[0].reshape(theta.shape)
    return theta


def zeros() -> nn.Linear:
    head = nn.Linear(WIDTH, CLASSES).double()
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def learned(head: nn.Linear) -> Values:
    """Weights and centered biases [C, F + 1]."""
    bias = head.bias - head.bias.mean()
    found: Values = torch.cat([head.weight, bias[:, None]], dim=1).detach().numpy()
    return found


@pytest.mark.parametrize("strength", [1e-6, 0.3, 20.0, 1e5])
def test_it_ends_at_the_minimum(strength: float) -> None:
    data, head = clouds(300), zeros()
    assert fit(head, data, strength, 1000, ALONE)
    expected = newton(data.features.numpy(), data.labels.numpy(), strength)
    expected[:, -1] -= expected[:, -1].mean()
    np.testing.assert_allclose(learned(head), expected, atol=1e-4)


def test_float32_features_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = zeros(), zeros()
    data = clouds(300)
    assert fit(whole, data, 0.3, 1000, ALONE)
    monkeypatch.setattr("engine.evaluation.logistic.ROWS", 64)
    assert fit(parts, data._replace(features=data.features.float()), 0.3, 1000, ALONE)
    np.testing.assert_allclose(learned(parts), learned(whole), atol=2e-4)


def test_too_few_iterations_are_told() -> None:
    assert not fit(zeros(), clouds(300), 0.3, 2, ALONE)


def fit_in_parts(cuts: list[int]) -> tuple[Values, Accuracy]:
    """On a rank, which holds its own slice of the features."""
    here = world.join(1, False)
    part = slice(cuts[here.rank], cuts[here.rank + 1])
    data, head = Features(*(tensor[part] for tensor in clouds(100))), zeros()
    assert fit(head, data, 0.3, 1000, here)
    return learned(head), measure(head, data, here, "data.val")


def test_sharded_equals_single(ranks: Ranks) -> None:
    """One process has no row at all."""
    head, accuracy = fit_in_parts([0, 100])
    for found, there in ranks.run(fit_in_parts, [0, 0, 60, 100], size=3):
        np.testing.assert_allclose(found, head, atol=1e-6)
        assert there == accuracy


def test_the_strengths_are_the_papers() -> None:
    config = LogisticConfig()
    assert (config.l2, config.strengths) == ((1e-6, 1e5), 45)
