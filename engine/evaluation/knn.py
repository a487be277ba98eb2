"""Find exact nearest neighbors by cosine and let them vote on the class.

The features may be spread over several processes.

Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination"
(arXiv 1805.01978), section 3.4.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Interval, MinLen
from torch import Tensor

from engine.evaluation.features import Features, measure_accuracy
from engine.evaluation.results import Result, Row, show_accuracy
from engine.evaluation.session import Evaluation
from engine.processes.world import World
from shards.errors import InputError

NOT_FINITE = (
    "features are not finite, so that nothing is near to anything: the encoder has diverged; take "
    "an earlier checkpoint"
)
QUERIES = 1024  # looked up at a time, over all processes
KEYS = 1 << 15  # features that a process compares them with at a time: 0.25 GB of cosines
UNIT = 2**26  # the whole number that stands for 1 in a normalized feature vector


class Neighbours(NamedTuple):
    """The k nearest images of each query, nearest first.

    Images that are equally near are ordered by sample id.
    """

    similarity: Tensor  # [N, k] float64, cosine
    labels: Tensor  # [N, k]
    ids: Tensor  # [N, k] sample ids


@torch.no_grad()
def find_nearest(bank: Features, queries: Tensor, k: int, world: World) -> Neighbours:
    """Find the k images of the bank that are nearest to each query.

    All processes call it together, and each looks up its own queries. A process never holds more
    of the bank than its own part: all queries are sent to every process, and each sends back what
    it found. The result does not depend on how bank and queries are distributed, even where images
    are equally near.

    Args:
        bank: The features to search. Each process gives its part.
        queries: [N, F], this process's queries.
        k: Number of images to find. When the bank has fewer, all of them are found.

    Raises InputError when the bank is empty, when no process has a query, or when a feature is not
    finite.
    """
    finite = bool(bank.features.isfinite().all() & queries.isfinite().all())
    if not all(world.all_gather_object(finite)):
        raise InputError(NOT_FINITE)
    by_id = bank.ids.argsort()
    keys = Features(*(part[by_id] for part in (_normalize(bank.features), bank.labels, bank.ids)))
    sizes = world.all_gather_object((len(bank.ids), len(queries)))
    total = sum(held for held, _ in sizes)
    if total == 0:
        raise InputError(
            "evaluation found nothing to look up: no image of data.train can be decoded, or none "
            "of those has a label"
        )
    if sum(count for _, count in sizes) == 0:
        raise InputError("evaluation found no image that can be decoded: see data.val")
    k, rows = min(k, total), max(1, QUERIES // world.size)
    found = []
    for start in range(0, max(count for _, count in sizes), rows):
        own = _normalize(queries[start : start + rows])
        padded = F.pad(own, (0, 0, 0, rows - len(own)))  # [rows, F]
        candidates = _find_nearest_here(keys, world.all_gather(padded), k)  # [W * rows, k] each
        answers = (world.all_to_all(part.unflatten(0, (world.size, rows))) for part in candidates)
        merged = Neighbours(*(answer.transpose(0, 1).flatten(1) for answer in answers))
        found.append(_take_best(merged, k, len(own)))  # the best of [rows, W * k]
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _normalize(features: Tensor) -> Tensor:
    """Normalize rows [N, F] to length 1 and round them to multiples of 1 / UNIT.

    The result is int32, from -UNIT to UNIT. The rounding makes cosines exact: products of such
    numbers are whole numbers, and every sum of them within a cosine is at most 2**52, which float64
    holds exactly. So a matrix product gives the same cosines in whatever order it adds, and equal
    images are equally near. The rounding changes a cosine by about 1e-8, which is less than float32
    does.
    """
    parts = [
        (F.normalize(part.double(), dim=1) * UNIT).round().int() for part in features.split(KEYS)
    ]
    return torch.cat(parts)


def _find_nearest_here(keys: Features, queries: Tensor, k: int) -> Neighbours:
    """Find the k nearest images within this process's part of the bank.

    When the part has fewer than k images, the rest is filled with id -1 and similarity -inf.

    Args:
        keys: This process's part of the bank, ordered by id, with features from `_normalize`.
        queries: [N, F] int32, from `_normalize`.
    """
    asked = queries.double() / UNIT**2  # exact, because UNIT is a power of 2
    shape = (len(queries), k)
    best = Neighbours(
        asked.new_full(shape, -torch.inf),
        keys.labels.new_zeros(shape),
        keys.ids.new_full(shape, -1),
    )
    for features, labels, ids in zip(*(part.split(KEYS) for part in keys), strict=True):
        similarity = asked @ features.double().T  # [N, n]
        columns = _find_largest(similarity, min(k, len(ids)))
        near = similarity.gather(1, columns), labels[columns], ids[columns]
        both = zip(best, near, strict=True)
        best = _take_best(Neighbours(*(torch.cat(pair, dim=1) for pair in both)), k, len(queries))
    return best


def _find_largest(values: Tensor, k: int) -> Tensor:
    """Return the columns [N, k] of the k largest values [N, n] of each row, in any order.

    Among equal values it takes the first columns; torch.topk would take any of them.
    """
    largest = values.topk(min(k + 1, values.shape[1]), dim=1)
    columns = largest.indices[:, :k].clone()
    least = largest.values[:, k - 1 : k]  # [N, 1]
    # [N]: whether a value that is left out equals the least one that is taken
    tied = (largest.values[:, k:] == least).any(1)
    if tied.any():
        some, bound = values[tied], least[tied]
        above, equal = some > bound, some == bound
        missing = k - above.sum(1, keepdim=True)
        columns[tied] = (above | (equal & (equal.cumsum(1) <= missing))).nonzero()[:, 1].view(-1, k)
    return columns


def _take_best(candidates: Neighbours, k: int, rows: int) -> Neighbours:
    """Return the k nearest candidates of each of the first `rows` queries, ordered by nearness."""
    similarity, _, ids = (part[:rows] for part in candidates)
    by_id = ids.argsort(dim=1)
    nearest_first = similarity.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    order = by_id.gather(1, nearest_first[:, :k])
    return Neighbours(*(part[:rows].gather(1, order) for part in candidates))


def vote(neighbours: Neighbours, k: int, temperature: float, classes: int) -> Tensor:
    """Let the first k neighbors of each query vote, and return scores [N, classes] float64.

    A class's score is the logarithm of the sum of exp(cosine / temperature) over its members among
    the k neighbors, plus a constant for each query. The score is -inf if and only if no neighbor
    has the class, however low the temperature is.
    """
    similarity, labels = neighbours.similarity[:, :k].double(), neighbours.labels[:, :k]
    exponents = (similarity - similarity[:, :1]) / temperature  # at most 0
    nearest_of_class = exponents.new_full((len(labels), classes), -torch.inf)
    nearest_of_class.scatter_reduce_(1, labels, exponents, "amax")
    weights = (exponents - nearest_of_class.gather(1, labels)).exp()  # from 0 to 1
    sums = torch.zeros_like(nearest_of_class).scatter_add_(1, labels, weights)  # 0, or at least 1
    return nearest_of_class + sums.log()


@dataclass(frozen=True)
class KNNConfig:
    """Options of kNN evaluation.

    One extraction and one search serve all combinations.
    """

    k: Annotated[tuple[int, ...], Interval(ge=1, le=2**31), MinLen(1)] = (20, 200)
    """Number of neighbors that vote. Several numbers are each measured."""
    temperature: Annotated[tuple[float, ...], Interval(ge=1e-3, le=1e3), MinLen(1)] = (0.07,)
    """Temperature of the votes: a neighbor's weight is exp(cosine / temperature). Several are each
    measured."""

    def settings(self) -> dict[str, Any]:
        """Return the options that decide the result."""
        return asdict(self)


def evaluate(evaluation: Evaluation, config: KNNConfig) -> Result:
    """Measure kNN accuracy on data.val, with data.train as the bank.

    The search is exact, and the result does not depend on the number of processes.
    """
    queries = evaluation.extract(evaluation.val)
    bank = evaluation.extract(evaluation.train)
    found = find_nearest(bank, queries.features, max(config.k), evaluation.world)
    images = found.ids.shape[1]  # at most max(config.k), and fewer where the bank has fewer
    if large := [k for k in dict.fromkeys(config.k) if k > images]:
        evaluation.terminal.say(
            f"--k {' '.join(map(str, large))}: limited to {images:,}, which are all images of "
            "data.train with a label"
        )
    metrics, table = {}, list[Row]()
    for k in config.k:
        for temperature in config.temperature:
            scores = vote(found, k, temperature, evaluation.classes)
            here = measure_accuracy(scores, queries.labels, evaluation.world, "data.val")
            row: Row = {"k": k, "temperature": f"{temperature:g}"}
            table.append(row | show_accuracy(here, evaluation.classes))
            metrics[evaluation.name(f"k{k}_t{temperature:g}_top1")] = here.top1
            if here.mean_class is not None:
                metrics[evaluation.name(f"k{k}_t{temperature:g}_mean_class")] = here.mean_class
    return Result(metrics, table)
