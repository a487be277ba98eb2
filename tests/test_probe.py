"""kNN against a NumPy one, and extraction."""

import numpy as np
import torch

from engine.probe import Features, extract, knn_correct
from shards.evaluation import EvalBatch


def numpy_knn(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int, temperature: float
) -> np.ndarray:
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    predicted = []
    for query in queries:
        cosine = bank @ query
        votes = np.zeros(labels.max() + 1)
        for neighbour in np.argsort(-cosine)[:k]:
            votes[labels[neighbour]] += np.exp(cosine[neighbour] / temperature)
        predicted.append(votes.argmax())
    return np.array(predicted)


def test_knn_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16))
    labels, truth = rng.integers(0, 5, 400), rng.integers(0, 5, 1500)
    bank = centres[labels] + 1.5 * rng.normal(size=(400, 16))
    queries = centres[truth] + 1.5 * rng.normal(size=(1500, 16))
    for k, temperature in ((1, 0.07), (20, 0.07), (200, 0.5)):
        expected = numpy_knn(bank, labels, queries, k, temperature) == truth
        found = knn_correct(
            Features(torch.tensor(bank), torch.tensor(labels)),
            Features(torch.tensor(queries), torch.tensor(truth)),
            neighbours=k,
            temperature=temperature,
            classes=5,
        )
        assert found.tolist() == expected.tolist()
        assert 0.3 < expected.mean() < 1  # neither trivial nor chance


def test_extract_leaves_out_the_unlabelled() -> None:
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    batches = [
        EvalBatch(images[:2], torch.tensor([1, -1])),
        EvalBatch(images[2:], torch.tensor([-1, -1])),
        EvalBatch(images[2:], torch.tensor([0, 2])),
    ]
    found = extract(lambda x: x.double().mean((2, 3)), batches, torch.device("cpu"))
    assert found.labels.tolist() == [1, 0, 2]
    assert found.features[:, 0].tolist() == [0, 2, 3]
