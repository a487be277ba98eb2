"""Read small parts of a remote file, in order, without fetching what lies between them.

Reading the headers of a tar in 512-byte requests would take one request for each member, and
reading the whole tar would take all its bytes. `open_skim` fetches a little more than what is asked
for, so that the next small members come along, and skips the contents of large ones.
"""

import io
from collections import deque
from typing import Any, BinaryIO, cast

from shards.storage import files

LEAST = 8 << 10  # A request asks for this many bytes at least.
MOST = 1 << 20  # Where reads lie close together, a request asks for up to this many bytes.
_MEMORY = 16  # The average distance between reads is that of about this many of them.


def open_skim(url: str) -> BinaryIO:
    """Open a file of which small parts are read. Raises FileNotFoundError."""
    return files.open_reader(url) if files.is_local(url) else cast(BinaryIO, _Skim(url))


class _Skim(io.RawIOBase):
    """A remote object as a file. What it has fetched last stays in memory."""

    def __init__(self, url: str) -> None:
        self._url, self._size, self._position = url, files.size(url), 0
        self._pieces: deque[tuple[int, bytes]] = deque(maxlen=2)
        self._end = 0  # Everything that was fetched ends before this byte.
        self._step, self._last, self._distance = LEAST, 0, float(LEAST)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = self._position
        stop = min(start + len(buffer), self._size)
        content = b""
        while start + len(content) < stop:
            content += self._read_piece(start + len(content), stop)
        buffer[: len(content)] = content
        self._position += len(content)
        self._distance += (abs(start - self._last) - self._distance) / _MEMORY
        self._last = start
        return len(content)

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
