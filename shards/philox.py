"""Philox4x32-10, the counter-based generator behind every random choice of the engine.

A counter-based generator has no state: the random words that belong to a place (epoch, shard,
sample, view) are computed from that place and the seed alone. Hence nothing to save in a
checkpoint, nothing that depends on how many threads or ranks draw, and any position of a run is
reached at once.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the key's increment each round: golden ratio, sqrt(3) - 1
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


class Domain(IntEnum):
    """What a draw is for: different domains never share a counter. Values are frozen."""

    SHARDS = 0
    BLOCKS = 1
    SAMPLES = 2
    VIEW = 3
    PACK = 4
    SYNTHETIC = 5
    HOLDOUT = 6
    SUBSET = 7
    FEATURES = 8


def philox(seed: int, counters: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32 over `counters` [..., 4], with `seed` (mod 2**64) as the key."""
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    x0, x1, x2, x3 = (counters[..., i].astype(np.uint64) for i in range(4))
    for _ in range(10):
        product0 = x0 * _MULTIPLIERS[0]
        product1 = x2 * _MULTIPLIERS[1]
        x0 = (product1 >> _HIGH) ^ x1 ^ np.uint64(key[0])
        x2 = (product0 >> _HIGH) ^ x3 ^ np.uint64(key[1])
        x1, x3 = product1 & _LOW, product0 & _LOW
        key = [(k + w) & 0xFFFFFFFF for k, w in zip(key, _WEYL, strict=True)]
    return np.stack((x0, x1, x2, x3), axis=-1).astype(np.uint32)


def draw(
    seed: int, domain: Domain, index: NDArray[np.int64], epoch: int = 0, minor: int = 0
) -> NDArray[np.uint32]:
    """Four random words for each `index`: [N] -> [N, 4].

    `index` is a place of 56 bits (a sample id, a shard's number), `epoch` has 32; `minor` (32 bits)
    tells draws at one place apart.
    """
    place = np.asarray(index, np.uint64)
    counters = np.empty((*place.shape, 4), np.uint32)
    counters[..., 0] = place & _LOW
    counters[..., 1] = (place >> _HIGH) | np.uint64(domain << 24)
    counters[..., 2] = epoch
    counters[..., 3] = minor
    return philox(seed, counters)


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Random words to floats in [0, 1): multiples of 2**-32."""
    return words.astype(np.float64) * 2.0**-32


def permutation(
    seed: int, domain: Domain, index: NDArray[np.int64], epoch: int
) -> NDArray[np.int64]:
    """A random order of the things at the places `index` [N]: positions [N], a permutation.

    The argsort of 64-bit keys, one for each place: every NumPy gives the same one.
    """
    words = draw(seed, domain, index, epoch).astype(np.uint64)
    return np.argsort(words[:, 0] << _HIGH | words[:, 1], kind="stable")
