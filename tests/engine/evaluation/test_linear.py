"""Linear evaluation against NumPy in float64: every step, its end, and on several ranks."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.evaluation.features import Features
from engine.evaluation.linear import LinearConfig, LinearTraining, make_batches
from engine.evaluation.supervised import Examples, hold_out, hold_out_nothing, mask_held_out
from engine.processes import world
from engine.processes.world import World
from tests.helpers.ranks import Ranks

ALONE = World(0, 1, 1, torch.device("cpu"))
CLASSES, WIDTH = 4, 6


def clouds(n: int) -> Features:
    """Overlapping classes: the best classifier is finite."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, n)
    points = rng.normal(size=(CLASSES, WIDTH))[labels] + rng.normal(size=(n, WIDTH))
    return Features(torch.tensor(points), torch.tensor(labels), torch.arange(n))


def examples(features: Tensor, labels: Tensor) -> Examples:
    return Examples(features, labels, int((labels >= 0).sum()))


def softmax_gradient(
    weight: np.ndarray, bias: np.ndarray, x: np.ndarray, labels: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean cross-entropy of x @ weight.T + bias, and its gradients, by the closed form."""
    logits = x @ weight.T + bias
    logits -= logits.max(axis=1, keepdims=True)
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = -np.log(share[np.arange(len(x)), labels]).mean()
    share[np.arange(len(x)), labels] -= 1
    return float(loss), share.T @ x / len(x), share.mean(axis=0)


def training(config: LinearConfig, steps: int, here: World = ALONE) -> LinearTraining:
    made = LinearTraining(config, WIDTH, CLASSES, steps, here)
    made.heads.double()
    return made


def test_every_step_equals_numpy() -> None:
    """Nesterov's momentum, the cosine, rates in proportion to the batch, unlabeled rows."""
    config = LinearConfig(lr=(0.4, 0.05), batch=32)
    data = clouds(160)
    ours = training(config, steps=5)
    weights = [head.weight.detach().numpy().copy() for head in ours.heads.each]
    biases = [head.bias.detach().numpy().copy() for head in ours.heads.each]
    assert np.array_equal(weights[0], weights[1])  # heads start alike
    speed = [[np.zeros_like(weights[0]), np.zeros_like(biases[0])] for _ in config.lr]
    for step in range(5):
        rows = slice(32 * step, 32 * step + 32)
        labels = data.labels[rows].clone()
        labels[::7] = -1
        losses = ours.train_step(examples(data.features[rows], labels))
        known = (labels >= 0).numpy()
        x, y = data.features[rows].numpy()[known], labels.numpy()[known]
        for head, lr in enumerate(config.lr):
            rate = lr * 32 / 256 * (1 + np.cos(np.pi * step / 5)) / 2
            loss, *gradients = softmax_gradient(weights[head], biases[head], x, y)
            assert losses[head].item() == pytest.approx(loss, rel=1e-12)
            for value, buffer, gradient in zip(
                (weights[head], biases[head]), speed[head], gradients, strict=True
            ):
                buffer[...] = 0.9 * buffer + gradient
                value -= rate * (gradient + 0.9 * buffer)
    for head, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        found = ours.heads.each[head]
        np.testing.assert_allclose(found.weight.detach().numpy(), weight, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.bias.detach().numpy(), bias, rtol=1e-10, atol=1e-12)


def newton(x: np.ndarray, labels: np.ndarray) -> float:
    """The least cross-entropy that any linear classifier has, by Newton's method in float64."""
    rows = np.hstack([x, np.ones((len(x), 1))])
    theta = np.zeros((CLASSES, WIDTH + 1))
    wanted = np.eye(CLASSES)[labels]
    for _ in range(30):
        logits = rows @ theta.T
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        gradient = (share - wanted).T @ rows / len(x)
        blocks = np.einsum("nc,cd->ncd", share, np.eye(CLASSES)) - np.einsum(
            "nc,nd->ncd", share, share
        )
        hessian = np.einsum("ncd,nf,ng->cfdg", blocks, rows, rows) / len(x)
        size = theta.size
        step = np.linalg.lstsq(hessian.reshape(size, size), gradient.reshape(-1), rcond=None)[0]
        theta -= step.reshape(theta.shape)
    return softmax_gradient(theta[:, :-1], theta[:, -1], x, labels)[0]


def test_long_training_ends_at_the_optimum() -> None:
    data = clouds(300)
    least = newton(data.features.numpy(), data.labels.numpy())
    config = LinearConfig(lr=(1.0, 1e-9), batch=256)
    ours = training(config, steps=1500)
    first = losses = torch.zeros(2)
    for step in range(1500):
        losses = ours.train_step(examples(data.features, data.labels))
        first = losses if step == 0 else first
    assert least < 0.9 < first[0].item()
    assert losses[0].item() == pytest.approx(least, abs=1e-6)
    assert losses[1].item() == pytest.approx(first[1].item(), abs=1e-4)  # each has its own rate


def test_stored_features_are_taken_once_an_epoch_but_those_held_out() -> None:
    data = clouds(100)
    held = hold_out(100, 10, seed=0)
    expected = np.flatnonzero(~held(np.arange(100)))
    assert 80 < len(expected) < 100
    batches, steps = make_batches(data, 100, LinearConfig(epochs=2, batch=16), held)
    assert steps == 2 * (len(expected) // 16)
    every = [batch.inputs[:, 0].tolist() for batch in batches(0)]
    first = data.features[:, 0].tolist()
    halves = every[: steps // 2], every[steps // 2 :]
    epochs = [[first.index(value) for batch in half for value in batch] for half in halves]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 16 * (steps // 2)
        assert set(epoch) <= set(expected.tolist())
    assert every[0] != every[steps // 2]
    again = [batch.inputs[:, 0].tolist() for batch in batches(3)]
    assert again == every[3:]  # any step is reached at once


def learn_in_parts(cuts: list[int]) -> tuple[list[float], Any]:
    """On a rank, which holds its own slice of the features."""
    here = world.join(1, False)
    part = slice(cuts[here.rank], cuts[here.rank + 1])
    data = Features(*(tensor[part] for tensor in clouds(100)))
    config = LinearConfig(epochs=5, batch=16, lr=(0.4, 0.1))
    batches, steps = make_batches(data, 100, config, hold_out(100, 10, seed=0))
    ours = training(config, steps, here)
    losses = [here.all_reduce(ours.train_step(batch))[0].item() for batch in batches(0)]
    return losses, ours.heads.each[0].weight.detach().numpy()


def test_sharded_equals_single(ranks: Ranks) -> None:
    """Uneven parts, one so small that it often has no row of a batch."""
    losses, weight = learn_in_parts([0, 100])
    for found, there in ranks.run(learn_in_parts, [0, 3, 60, 100], size=3):
        np.testing.assert_allclose(found, losses, rtol=1e-12)
        np.testing.assert_allclose(there, weight, rtol=1e-9, atol=1e-12)


def test_state_goes_on_where_it_was() -> None:
    data = clouds(96)
    config = LinearConfig(lr=(0.4, 0.2))
    parts = zip(data.features.split(16), data.labels.split(16), strict=True)
    batches = [examples(features, labels) for features, labels in parts]
    through = training(config, 6)
    for batch in batches:
        through.train_step(batch)
    first, second = training(config, 6), training(dataclasses.replace(config, seed=9), 6)
    for batch in batches[:3]:
        first.train_step(batch)
    for name, part in second.state().items():
        for key, value in part.items():
            value.copy_(first.state()[name][key])
    second.step = 3
    for batch in batches[3:]:
        second.train_step(batch)
    for ours, expected in zip(second.heads.parameters(), through.heads.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_a_head_that_diverges_spoils_no_other() -> None:
    data = clouds(64)
    wild, alone = training(LinearConfig(lr=(0.1, 1e308)), 4), training(LinearConfig(lr=(0.1,)), 4)
    for _ in range(4):
        wild.train_step(examples(data.features, data.labels))
        alone.train_step(examples(data.features, data.labels))
    assert not wild.heads.each[1].weight.isfinite().all()
    torch.testing.assert_close(wild.heads.each[0].weight, alone.heads.each[0].weight)


def test_hold_out_is_of_each_id_alone() -> None:
    held = hold_out(50_000, 10_000, seed=1)
    ids = np.arange(50_000)
    assert 0.09 < held(ids).mean() < 0.11  # a tenth at most
    assert np.array_equal(held(ids)[::3], held(ids[::3]))
    assert (hold_out(50_000, 10_000, seed=2)(ids) != held(ids)).any()
    assert 0.007 < hold_out(1_281_167, 10_009, seed=0)(np.arange(10**6)).mean() < 0.009
    labels = torch.arange(1000)
    hidden: Tensor = mask_held_out(labels, ids[:1000], held) == -1
    assert np.array_equal(hidden.numpy(), held(ids[:1000]))
    assert not hold_out_nothing(ids).any()
