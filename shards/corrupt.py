"""Replace samples that can't be decoded, count them, and stop when there are too many."""

import threading
from collections.abc import Callable
from itertools import chain

from torch import Tensor

from shards.decode import DecodeError
from shards.errors import InputError
from shards.reader import BlockReader
from shards.samples import Block

Record = Callable[[int, str, DecodeError], None]  # of a bad sample: its id, its name, the reason


class Faults:
    """Counts the samples that can't be decoded, and reports each of them once.

    More than `limit` of them are an error.
    """

    def __init__(self, samples: int, fraction: float, report: Callable[[str], None]) -> None:
        """Allow `fraction` of the data set's `samples` to be bad, but never fewer than 10."""
        self.limit, self.report = max(10, int(fraction * samples)), report
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return len(self._seen)

    def record(self, sample_id: int, name: str, reason: DecodeError | str) -> None:
        """Count and report a bad sample, unless it was counted before.

        Raises InputError once there are more than `limit` distinct ones.
        """
        with self._lock:
            if sample_id in self._seen:
                return
            self._seen.add(sample_id)
            count = len(self._seen)
        if count > self.limit:
            raise InputError(
                f"{name}: {reason}; {count} samples were left out, more than data.corrupt allows "
                f"({self.limit}): repair the data set, or raise data.corrupt"
            )
        self.report(f"{name}: {reason}; not used (up to {self.limit} such samples are allowed)")


def decode_good(
    reader: BlockReader, block: Block, row: int, first_id: int, record: Record
) -> tuple[int, Tensor]:
    """Find the first sample that can be decoded, from `row` on, and return its row and image.

    The search goes in file order and wraps around at the end of the block.

    Args:
        row: Row of the block to start from.
        first_id: Id of the sample in the block's row 0.
        record: Takes the samples before it.

    Raises InputError when there are too many faults, or when no sample of the block can be decoded.
    """
    try:
        return row, reader.decode(block, row)  # as nearly always
    except DecodeError:
        pass
    reason = ""
    for candidate in chain(range(row, len(block)), range(row)):
        try:
            return candidate, reader.decode(block, candidate)
        except DecodeError as error:
            name = reader.name_sample(block, candidate, first_id)
            record(first_id + candidate, name, error)
            reason = str(error)
    raise InputError(
        f"{reader.url_of(first_id)}: none of the {len(block)} samples of a block can be decoded, "
        f"the last one because: {reason}: restore the shard, or pack the images again without "
        "those that are damaged"
    )
