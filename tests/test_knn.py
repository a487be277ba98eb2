"""kNN against a brute-force NumPy one, by one process and by several; extraction."""

from typing import Any

import numpy as np
import pytest
import torch

from engine import knn, world
from engine.features import Features, accuracy, extract
from engine.knn import nearest, vote
from engine.world import World
from shards.errors import InputError
from shards.evaluation import EvalBatch
from tests.ranks import Ranks

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
CLASSES = 7


def numpy_knn(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int, temperature: float
) -> np.ndarray:
    """The classes [N, C] by falling votes, -1 where none of the neighbours has one."""
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    ranked = []
    for query in queries:
        cosine = bank @ query
        votes = np.zeros(CLASSES)
        for neighbour in np.argsort(-cosine)[:k]:
            votes[labels[neighbour]] += np.exp(cosine[neighbour] / temperature)
        order = np.argsort(-votes)
        ranked.append(np.where(votes[order] > 0, order, -1))
    return np.array(ranked)


def clouds(n: int, seed: int) -> Features:
    """Points in float64 around one centre for each class: neither trivial nor at chance."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLASSES, 16))
    labels = rng.integers(0, CLASSES, n)
    points = centres[labels] + 1.5 * rng.normal(size=(n, 16))
    return Features(torch.tensor(points), torch.tensor(labels), torch.arange(n) + 1000)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.5), (999, 0.02)])
def test_knn_equals_numpy(k: int, temperature: float) -> None:
    bank, queries = clouds(400, 1), clouds(1500, 2)
    labels = queries.labels.numpy()
    ranked = numpy_knn(
        bank.features.numpy(), bank.labels.numpy(), queries.features.numpy(), k, temperature
    )
    found = nearest(bank, queries.features, k, ALONE)
    result = accuracy(vote(found, k, temperature, CLASSES), queries.labels, ALONE, "data.val")
    assert result.top1 == (ranked[:, 0] == labels).mean()
    assert result.top5 == (ranked[:, :5] == labels[:, None]).any(axis=1).mean()
    assert 0.2 < result.top1 <= result.top5 < 1


def test_fewer_neighbours_are_the_nearest_of_more(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = clouds(400, 1), clouds(50, 2)
    whole = nearest(bank, queries.features, 30, ALONE)
    monkeypatch.setattr(knn, "KEYS", 7)  # a bank that is compared in many parts
    monkeypatch.setattr(knn, "QUERIES", 13)
    some = nearest(bank, queries.features, 10, ALONE)
    assert torch.allclose(some.similarity, whole.similarity[:, :10])
    assert torch.equal(some.ids, whole.ids[:, :10])
    assert torch.equal(bank.labels[whole.ids - 1000], whole.labels)


def find_in_parts(cuts: list[int], query_cuts: list[int]) -> tuple[Any, ...]:
    """On a rank: neighbours with its own slice of bank and queries."""
    here = world.enter(1, False)
    bank, queries = clouds(300, 1), clouds(90, 2)
    part = slice(cuts[here.rank], cuts[here.rank + 1])
    asked = slice(query_cuts[here.rank], query_cuts[here.rank + 1])
    found = nearest(Features(*(tensor[part] for tensor in bank)), queries.features[asked], 20, here)
    scores = vote(found, 20, 0.07, CLASSES)
    top = accuracy(scores, queries.labels[asked], here, "data.val")
    return found.ids.tolist(), tuple(top)


def test_sharded_equals_single(ranks: Ranks) -> None:
    """Uneven parts, one of the bank smaller than k, one process without queries."""
    bank, queries = clouds(300, 1), clouds(90, 2)
    found = nearest(bank, queries.features, 20, ALONE)
    expected = accuracy(vote(found, 20, 0.07, CLASSES), queries.labels, ALONE, "data.val")
    answers = ranks.run(find_in_parts, [0, 5, 180, 300], [0, 50, 50, 90], size=3)
    assert [row for ids, _ in answers for row in ids] == found.ids.tolist()
    assert {top for _, top in answers} == {tuple(expected)}


def test_an_empty_bank_is_told() -> None:
    empty = Features(torch.empty(0, 16), *(torch.empty(0, dtype=torch.int64) for _ in range(2)))
    with pytest.raises(InputError, match=r"no labelled image to look up: see data\.train"):
        nearest(empty, torch.ones(3, 16), 5, ALONE)


def test_extract_leaves_out_the_unlabelled() -> None:
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    batches = [
        EvalBatch(images[:2], torch.tensor([1, -1]), torch.tensor([0, 1])),
        EvalBatch(images[2:], torch.tensor([-1, -1]), torch.tensor([2, 3])),
        EvalBatch(images[2:], torch.tensor([0, 2]), torch.tensor([4, 5])),
    ]
    cpu = torch.device("cpu")
    found = extract(lambda x: x.double().mean((2, 3)), batches, cpu)
    assert found.labels.tolist() == [1, 0, 2]
    assert found.ids.tolist() == [0, 4, 5]
    assert found.features[:, 0].tolist() == [0, 2, 3]
    everything = extract(lambda x: x.double().mean((2, 3)), batches, cpu, unlabelled=True)
    assert everything.ids.tolist() == list(range(6))
