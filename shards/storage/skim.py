"""Read small parts of a remote file, in order, without fetching what lies between them.

Reading the headers of a tar in 512-byte requests would take one request for each member, and
reading the whole tar would take all its bytes. `open_skim` fetches a little more than what is asked
for, so that the next small members come along, and skips the contents of large ones.
"""

from collections import deque
from typing import BinaryIO, cast

from shards.storage import files
from shards.storage.range_file import RangeFile

LEAST = 8 << 10  # A request asks for this many bytes at least.
MOST = 1 << 20  # Where reads lie close together, a request asks for up to this many bytes.
_MEMORY = 16  # The average distance between reads is that of about this many of them.


def open_skim(url: str) -> BinaryIO:
    """Open a file of which small parts are read. Raises FileNotFoundError."""
    if files.is_local(url):
        return files.open_reader(url)
    size = files.size(url)
    return cast(BinaryIO, RangeFile(size, _Skim(url, size).read_range))


class _Skim:
    """Reads ranges of a remote object. What it has fetched last stays in memory."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size = url, size
        self._pieces: deque[tuple[int, bytes]] = deque(maxlen=2)
        self._end = 0  # Everything that was fetched ends before this byte.
        self._step, self._last, self._distance = LEAST, 0, float(LEAST)

    def read_range(self, start: int, stop: int) -> bytes:
        content = b""
        while start + len(content) < stop:
            content += self._read_piece(start + len(content), stop)
        self._distance += (abs(start - self._last) - self._distance) / _MEMORY
        self._last = start
        return content

    def _read_piece(self, start: int, stop: int) -> bytes:
        """Return bytes from `start` on, at most up to `stop`."""
        for at, piece in self._pieces:
            if at <= start < at + len(piece):
                return piece[start - at : stop - at]
        # Looking back is rare, and what follows there was fetched before.
        end = stop
        if start >= self._end:
            self._step = min(2 * self._step, MOST) if self._distance < LEAST else LEAST
            end = self._end = min(max(stop, start + self._step), self._size)
        content = files.read(self._url, start, end)
        self._pieces.append((start, content))
        return content[: stop - start]
