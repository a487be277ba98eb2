"""The blocks of a shard: consecutive samples that one range read fetches."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.digest import digest
from shards.documents import Natural, check
from shards.errors import InputError
from shards.tar import BLOCK

Blocks = NDArray[np.int64]  # [K, 2] byte offset in the shard, number of samples


def check_blocks(value: object, samples: int, size: int, name: str) -> Blocks:
    """Return the blocks of a shard of `samples` and `size` bytes, as an array [K, 2].

    They stand in the file one after another, and no block has more samples than fit. Raises
    InputError, which names the field `name`, for other values.
    """
    if not _are_pairs(value):  # This is seven times as fast as the check that names the fault.
        value = check(list[tuple[Natural, Natural]], value, name)
    blocks: Blocks = np.array(value, np.int64).reshape(-1, 2)
    starts, counts = blocks[:, 0], blocks[:, 1]
    lengths = np.diff(starts, append=size)
    if (lengths <= 0).any():
        raise InputError(
            f"{name} must begin one after another within the {size} bytes of the shard"
        )
    # Every sample has a header of its own. So what a count may ask for is bounded by the file.
    if (counts < 1).any() or (counts > lengths // BLOCK).any():
        raise InputError(f"{name} must have from 1 to as many samples as fit into each block")
    if counts.sum() != samples:
        raise InputError(f"{name} must hold the shard's {samples} samples, not {counts.sum()}")
    return blocks


def _are_pairs(value: Any) -> bool:
    return (
        type(value) is list
        and {type(pair) for pair in value} <= {list}
        and {len(pair) for pair in value} <= {2}
        and {type(number) for pair in value for number in pair} <= {int}
        and all(0 <= start < 2**62 and 0 <= count < 2**62 for start, count in value)
    )


def checksum(blocks: Blocks) -> str:
    return digest(blocks.astype("<i8").tobytes())
