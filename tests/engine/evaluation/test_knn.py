"""kNN against a brute-force NumPy one, by one process and by several; extraction."""

import math
import operator
from decimal import Context, Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch

from engine.evaluation import knn
from engine.evaluation.features import Features, extract, measure_accuracy
from engine.evaluation.knn import Neighbours, find_nearest, vote
from engine.processes import world
from engine.processes.world import World
from shards.center_crops import EvalBatch
from shards.errors import InputError
from tests.helpers.ranks import Ranks

ALONE = World(0, 1, 1, torch.device("cpu"))
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
    """Points in float64 around one center for each class: neither trivial nor at chance."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(0).normal(size=(CLASSES, 16))
    labels = rng.integers(0, CLASSES, n)
    points = centers[labels] + 1.5 * rng.normal(size=(n, 16))
    return Features(torch.tensor(points), torch.tensor(labels), torch.arange(n) + 1000)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.5), (999, 0.02)])
def test_knn_equals_numpy(k: int, temperature: float) -> None:
    bank, queries = clouds(400, 1), clouds(1500, 2)
    labels = queries.labels.numpy()
    ranked = numpy_knn(
        bank.features.numpy(), bank.labels.numpy(), queries.features.numpy(), k, temperature
    )
    found = find_nearest(bank, queries.features, k, ALONE)
    result = measure_accuracy(
        vote(found, k, temperature, CLASSES), queries.labels, ALONE, "data.val"
    )
    assert result.top1 == (ranked[:, 0] == labels).mean()
    assert result.top5 == (ranked[:, :5] == labels[:, None]).any(axis=1).mean()
    assert 0.2 < result.top1 <= result.top5 < 1


def test_fewer_neighbours_are_the_nearest_of_more(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = clouds(400, 1), clouds(50, 2)
    whole = find_nearest(bank, queries.features, 30, ALONE)
    monkeypatch.setattr(knn, "KEYS", 7)  # a bank that is compared in many parts
    monkeypatch.setattr(knn, "QUERIES", 13)
    some = find_nearest(bank, queries.features, 10, ALONE)
    assert torch.allclose(some.similarity, whole.similarity[:, :10])
    assert torch.equal(some.ids, whole.ids[:, :10])
    assert torch.equal(bank.labels[whole.ids - 1000], whole.labels)


def find_in_parts(cuts: list[int], query_cuts: list[int]) -> tuple[Any, ...]:
    """On a rank: neighbours with its own slice of bank and queries."""
    here = world.join(1, False)
    bank, queries = clouds(300, 1), clouds(90, 2)
    part = slice(cuts[here.rank], cuts[here.rank + 1])
    asked = slice(query_cuts[here.rank], query_cuts[here.rank + 1])
    found = find_nearest(
        Features(*(tensor[part] for tensor in bank)), queries.features[asked], 20, here
    )
    scores = vote(found, 20, 0.07, CLASSES)
    top = measure_accuracy(scores, queries.labels[asked], here, "data.val")
    return found.ids.tolist(), tuple(top)


def test_sharded_equals_single(ranks: Ranks) -> None:
    """Uneven parts, one of the bank smaller than k, one process without queries."""
    bank, queries = clouds(300, 1), clouds(90, 2)
    found = find_nearest(bank, queries.features, 20, ALONE)
    expected = measure_accuracy(vote(found, 20, 0.07, CLASSES), queries.labels, ALONE, "data.val")
    answers = ranks.run(find_in_parts, [0, 5, 180, 300], [0, 50, 50, 90], size=3)
    assert [row for ids, _ in answers for row in ids] == found.ids.tolist()
    assert {top for _, top in answers} == {tuple(expected)}


def with_duplicates(n: int, seed: int, dtype: torch.dtype) -> Features:
    """Few different points many times, with other labels and ids that are not in order."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(max(1, n // 10), 16))
    features = torch.tensor(points[rng.integers(0, len(points), n)], dtype=dtype)
    scales = torch.tensor(2.0 ** rng.integers(-3, 4, (n, 1)))  # equal directions all the same
    ids = torch.tensor(rng.permutation(n) * 3 + 7)
    return Features(features * scales.to(dtype), torch.tensor(rng.integers(0, CLASSES, n)), ids)


def by_brute_force(bank: Features, queries: torch.Tensor, k: int) -> list[list[int]]:
    """Ids of the k nearest by a full sort; cosines by math.fsum, which rounds once."""
    directions = [
        [row / math.sqrt(math.fsum(x * x for x in rows)) for row in rows]
        for rows in bank.features.double().tolist()
    ]
    found = []
    for query in queries.double().tolist():
        cosines = [math.fsum(map(operator.mul, query, row)) for row in directions]
        order = sorted(zip(cosines, bank.ids.tolist(), strict=True), key=lambda x: (-x[0], x[1]))
        found.append([number for _, number in order[:k]])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keys", [1 << 15, 11])
@pytest.mark.parametrize("k", [1, 15, 40, 500])
def test_equally_near_ones_come_by_id(
    k: int, keys: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, queries = with_duplicates(300, 1, dtype), with_duplicates(40, 2, dtype)
    monkeypatch.setattr(knn, "KEYS", keys)
    found = find_nearest(bank, queries.features, k, ALONE)
    assert found.ids.tolist() == by_brute_force(bank, queries.features, k)
    labels = dict(zip(bank.ids.tolist(), bank.labels.tolist(), strict=True))
    assert found.labels.tolist() == [[labels[i] for i in row] for row in found.ids.tolist()]


def find_duplicates(size: int, keys: int) -> tuple[Any, ...]:
    """On a rank: neighbours among every `size`th sample of a bank with duplicates."""
    here = world.join(1, False)
    bank, queries = with_duplicates(300, 3, torch.float32), with_duplicates(48, 4, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "KEYS", keys)
        own = Features(*(tensor[here.rank :: size] for tensor in bank))
        asked = queries.features.chunk(size)[here.rank]
        found = find_nearest(own, asked, 15, here)
    return found.similarity.tolist(), found.ids.tolist(), vote(found, 15, 0.07, CLASSES).tolist()


def test_duplicates_do_not_depend_on_the_processes(ranks: Ranks) -> None:
    """Bit for bit: cosines, neighbours and votes of 1 to 4 processes, in parts of any length."""
    bank, queries = with_duplicates(300, 3, torch.float32), with_duplicates(48, 4, torch.float32)
    whole = find_nearest(bank, queries.features, 15, ALONE)
    scores = vote(whole, 15, 0.07, CLASSES)
    assert whole.ids.tolist() == by_brute_force(bank, queries.features, 15)
    for size, keys in ((1, 7), (2, 1 << 15), (2, 13), (3, 1 << 15), (4, 50)):
        answers = ranks.run(find_duplicates, size, keys, size=size)
        for number, expected in enumerate((whole.similarity, whole.ids, scores)):
            assert [row for answer in answers for row in answer[number]] == expected.tolist()


def test_cosines_are_the_same_wherever_a_row_stands() -> None:
    """At the edge of a matrix as inside, in any company: float32 products differ there."""
    rng = torch.Generator().manual_seed(0)
    row, query = torch.randn(2, 1, 515, generator=rng)
    others = torch.randn(130, 515, generator=rng)
    seen = set()
    for n in (0, 1, 3, 7, 31, 64, 129):
        for queries in (1, 2, 5, 33):
            features = torch.cat([others[:n], row, others[n:]])[: n + 1 + n % 3]
            bank = Features(features, *(torch.arange(len(features)) for _ in range(2)))
            found = find_nearest(bank, query.expand(queries, -1), len(features), ALONE)
            seen |= set(found.similarity[found.ids == n].tolist())
    assert len(seen) == 1
    exact = math.fsum((row * query).double().flatten().tolist())
    exact /= row.double().norm().item() * query.double().norm().item()
    assert seen.pop() == pytest.approx(exact, abs=3e-8)


def log_votes(similarity: list[float], labels: list[int], temperature: float) -> list[float]:
    """The scores of one query in decimal arithmetic, where nothing underflows."""
    with localcontext(Context(prec=60, Emax=10**9, Emin=-(10**9))):
        nearest_one = Decimal(similarity[0])
        sums = [Decimal(0)] * CLASSES
        for cosine, label in zip(similarity, labels, strict=True):
            sums[label] += ((Decimal(cosine) - nearest_one) / Decimal(temperature)).exp()
        return [float(total.ln()) if total else -math.inf for total in sums]


@pytest.mark.parametrize("temperature", [0.001, 0.003, 0.01, 0.07, 0.2, 1.0, 30.0, 1000.0])
def test_votes_are_exact_at_every_temperature(temperature: float) -> None:
    """From the lowest to the highest that is allowed; far classes are ranked too, for top-5."""
    rng = np.random.default_rng(0)
    similarity = torch.tensor(-np.sort(-rng.uniform(-1, 1, (30, 20))))
    labels = torch.tensor(rng.integers(0, CLASSES - 1, (30, 20)))  # one class never occurs
    found = vote(Neighbours(similarity, labels, labels), 20, temperature, CLASSES)
    rows = zip(similarity.tolist(), labels.tolist(), strict=True)
    expected = torch.tensor([log_votes(*row, temperature) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.isinf(found[:, -1]).all()
    assert torch.equal(torch.isinf(found), torch.isinf(expected))


def test_low_temperatures_are_the_nearest_neighbour() -> None:
    bank, queries = clouds(400, 1), clouds(300, 2)
    found = find_nearest(bank, queries.features, 20, ALONE)
    first = (found.labels[:, 0] == queries.labels).double().mean().item()
    top = measure_accuracy(vote(found, 20, 0.001, CLASSES), queries.labels, ALONE, "data.val")
    assert top.top1 == pytest.approx(first, abs=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_told(value: float) -> None:
    bank, queries = clouds(40, 1), clouds(5, 2)
    queries.features[3, 7] = value
    with pytest.raises(InputError, match="the encoder has diverged"):
        find_nearest(bank, queries.features, 5, ALONE)
    with pytest.raises(InputError, match="the encoder has diverged"):
        find_nearest(queries, bank.features, 5, ALONE)


def test_an_empty_bank_is_told() -> None:
    empty = Features(torch.empty(0, 16), *(torch.empty(0, dtype=torch.int64) for _ in range(2)))
    with pytest.raises(InputError, match=r"no image of data\.train can be decoded, or none of"):
        find_nearest(empty, torch.ones(3, 16), 5, ALONE)


def test_extract_leaves_out_the_unlabeled() -> None:
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
    everything = extract(lambda x: x.double().mean((2, 3)), batches, cpu, unlabeled=True)
    assert everything.ids.tolist() == list(range(6))
