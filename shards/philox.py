"""Implement Philox4x32-10, the counter-based generator behind every random choice of the engine.

A counter-based generator has no state. The random words for a place (epoch, shard, sample, view)
are computed from that place and the seed alone. So a checkpoint has nothing to save, nothing
depends on how many threads or ranks draw, and any position of a run is reached at once.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)  # Each round adds these to the key: golden ratio, sqrt(3) - 1.
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


class Domain(IntEnum):
    """The purpose of a draw. Different domains never share a counter.

    The values must never change.
    """

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
    """Run ten rounds of Philox4x32 on `counters` [..., 4], with `seed` (mod 2**64) as the key."""
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
    seed: int,
    domain: Domain,
    index: NDArray[np.int64],
    epoch: int = 0,
    minor: int | NDArray[np.int64] = 0,
) -> NDArray[np.uint32]:
    """Draw four random words for each place: [N] -> [N, 4].

    Args:
        index: [N] Places of up to 56 bits, such as sample ids or shard numbers.
        epoch: A number of up to 32 bits.
        minor: A number of up to 32 bits that distinguishes draws at the same place. With several,
            [M, 1], there are several draws for each place, [M, N, 4].
    """
    place = np.asarray(index, np.uint64)
    counters = np.empty((*np.broadcast_shapes(place.shape, np.shape(minor)), 4), np.uint32)
    counters[..., 0] = place & _LOW
    counters[..., 1] = (place >> _HIGH) | np.uint64(domain << 24)
    counters[..., 2] = epoch
    counters[..., 3] = minor
    return philox(seed, counters)


def uniform(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Turn random words into floats in [0, 1), which are multiples of 2**-32."""
    return words.astype(np.float64) * 2.0**-32


def permutation(
    seed: int, domain: Domain, index: NDArray[np.int64], epoch: int
) -> NDArray[np.int64]:
    """Return a random permutation [N] of the positions of `index` [N].

    It is the argsort of 64-bit keys, one for each place, so every NumPy gives the same result.
    """
    words = draw(seed, domain, index, epoch).astype(np.uint64)
    return np.argsort(words[:, 0] << _HIGH | words[:, 1], kind="stable")
