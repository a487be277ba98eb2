"""Exact nearest neighbours by cosine, and their vote; with the features spread over processes.

Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination"
(arXiv 1805.01978), section 3.4.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.features import Features
from engine.world import World
from shards.errors import InputError

QUERIES = 1024  # of all processes together that are looked up at a time
KEYS = 1 << 17  # that a process compares them with at a time: 0.5 GB of similarities


class Neighbours(NamedTuple):
    """The k nearest images of each query, nearest first."""

    similarity: Tensor  # [N, k] cosine
    labels: Tensor  # [N, k]
    ids: Tensor  # [N, k] sample ids


@torch.no_grad()
def nearest(bank: Features, queries: Tensor, k: int, world: World) -> Neighbours:
    """The k nearest (or all, where there are fewer) of all processes' `bank` to each query [N, F].

    Each process looks up its own queries; all call this together. No process ever holds more of
    the bank than its own part: queries travel to it, and what it found back. Raises InputError
    when the bank is empty.
    """
    keys = F.normalize(bank.features, dim=1)  # [n, F]
    sizes = world.collect((len(keys), len(queries)))
    total = sum(held for held, _ in sizes)
    if total == 0:
        raise InputError("evaluation found no labelled image to look up: see data.train")
    if sum(count for _, count in sizes) == 0:
        raise InputError("evaluation found no image that can be decoded: see data.val")
    k, rows = min(k, total), max(1, QUERIES // world.size)
    found = []
    for start in range(0, max(count for _, count in sizes), rows):
        own = F.normalize(queries[start : start + rows], dim=1)
        padded = F.pad(own, (0, 0, 0, rows - len(own)))  # [rows, F]
        candidates = _nearest_here(keys, bank, world.gather(padded), k)  # [W * rows, k] each
        answers = (world.exchange(part.unflatten(0, (world.size, rows))) for part in candidates)
        merged = Neighbours(*(answer.transpose(0, 1).flatten(1) for answer in answers))
        found.append(_best(merged, k, len(own)))  # of [rows, W * k]
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _nearest_here(keys: Tensor, bank: Features, queries: Tensor, k: int) -> Neighbours:
    """Of this process's part of the bank; what it lacks to k is infinitely far."""
    shape = (len(queries), k)
    best = Neighbours(
        keys.new_full(shape, -torch.inf),
        bank.labels.new_zeros(shape),
        bank.ids.new_full(shape, -1),
    )
    for start in range(0, len(keys), KEYS):
        part = slice(start, start + KEYS)
        similarity = queries @ keys[part].T  # [N, n]
        near = similarity.topk(min(k, similarity.shape[1]), dim=1)
        labels, ids = bank.labels[part][near.indices], bank.ids[part][near.indices]
        both = zip(best, (near.values, labels, ids), strict=True)
        best = _best(Neighbours(*(torch.cat(pair, dim=1) for pair in both)), k, len(queries))
    return best


def _best(candidates: Neighbours, k: int, rows: int) -> Neighbours:
    """The k nearest of each of the first `rows` queries."""
    order = candidates.similarity[:rows].topk(k, dim=1).indices
    return Neighbours(*(part[:rows].gather(1, order) for part in candidates))


def vote(neighbours: Neighbours, k: int, temperature: float, classes: int) -> Tensor:
    """Scores [N, classes]: the first k neighbours' weights exp(cosine / temperature), by class.

    -inf for a class that none of them has.
    """
    similarity, labels = neighbours.similarity[:, :k], neighbours.labels[:, :k]
    weights = ((similarity - 1) / temperature).exp()  # all by one factor, which never overflows
    scores = weights.new_zeros(len(weights), classes)
    scores.scatter_add_(1, labels, weights)
    return scores.masked_fill_(scores == 0, -torch.inf)
