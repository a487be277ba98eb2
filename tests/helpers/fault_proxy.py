"""A forwarding HTTP proxy that harms some of the requests that pass, to stand before a store.

It runs in a thread: clients are other processes or s3fs's own thread, and to count for a test and
be told by it needs no protocol then. Requests pass unchanged, the Host header too, which S3 signs.
"""

import asyncio
import concurrent.futures
import dataclasses
import random
import re
import threading
import urllib.parse
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import AsyncIterator

KINDS = ("delay", "slow_down", "drop", "truncate", "wrong")
DELAY = (0.05, 1.0)  # seconds
PIECE = 1 << 16  # bytes read at a time

_XML = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{}</Code><Message>{}</Message></Error>'
_REFUSALS = {  # status: its phrase, and the answer's body
    503: ("Slow Down", _XML.format("SlowDown", "Please reduce your request rate.")),
    403: ("Forbidden", _XML.format("AccessDenied", "This user may not do that to {}.")),
}
Pieces = AsyncIterator[bytes]
_GONE = (ConnectionError, asyncio.IncompleteReadError)  # the other side went away


@dataclasses.dataclass
class Request:
    """One request that came, and what it got."""

    method: str
    path: str
    """With its query, percent signs resolved."""
    status: int = 0
    """0 until an answer is sent, and for ever when it got lost."""
    sent: int = 0
    """Bytes of the answer's body."""

    def matches(self, pattern: str) -> bool:
        return re.search(pattern, f"{self.method} {self.path}") is not None


class FaultProxy:
    """Forwards to `upstream` ("http://host:port") with `faults`: a kind's chance per request.

    delay      waits for DELAY before it forwards
    slow_down  answers 503 SlowDown and does not forward
    drop       closes the connection in the middle of a GET's body; of other requests, the store
               has done them, but the answer is lost
    truncate   sends the first part of a GET's body as if it were the whole
    wrong      flips the bits of a stretch of a GET's body

    `only` and all other patterns are regular expressions searched for in "METHOD /path?query". The
    generator draws as these requests arrive. Of drop, truncate and wrong a request gets one.
    What `deny` names is answered 403 AccessDenied, always.
    """

    def __init__(
        self, upstream: str, seed: int, faults: dict[str, float], only: str = ".*"
    ) -> None:
        parts = urllib.parse.urlsplit(upstream)
        self._upstream = parts.hostname, parts.port
        self._random = random.Random(seed)
        self._counts: Counter[str] = Counter()
        self.log: list[Request] = []
        self.endpoint = ""
        self._denied = ""
        self.set(faults, only)

    def set(self, faults: dict[str, float], only: str = ".*") -> None:
        """Other faults from now on. Raises ValueError for a kind that there is not."""
        if unknown := faults.keys() - set(KINDS):
            raise ValueError(f"no such fault: {', '.join(sorted(unknown))}")
        self._plan = {kind: faults.get(kind, 0.0) for kind in KINDS}, only

    def deny(self, pattern: str) -> None:
        """Allow no request of this pattern from now on; "" allows all."""
        self._denied = pattern

    def counts(self) -> dict[str, int]:
        """How often each kind of fault was done."""
        return {kind: self._counts[kind] for kind in KINDS}

    def bytes_sent(self, pattern: str = ".*") -> int:
        """Bytes of all answers' bodies, without those of slow_down."""
        return sum(request.sent for request in list(self.log) if request.matches(pattern))

    def requests(self, pattern: str = ".*", method: str | None = None) -> int:
        found = [request for request in list(self.log) if request.matches(pattern)]
        return sum(method in (None, request.method) for request in found)

    def __enter__(self) -> "FaultProxy":
        started: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._failures: list[Exception] = []
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started)), name="fault proxy", daemon=True
        )
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{started.result(10)}"
        return self

    def __exit__(self, *_: object) -> None:
        """Closes all connections. Raises RuntimeError if the proxy itself was faulty."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        if self._failures:
            raise RuntimeError(f"the proxy failed: {self._failures}")

    async def _serve(self, started: "concurrent.futures.Future[int]") -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._converse, "127.0.0.1", 0)
        started.set_result(server.sockets[0].getsockname()[1])
        await self._stop.wait()
        server.close()

    async def _converse(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (*_GONE, asyncio.CancelledError):
            pass
        except Exception as error:  # asyncio would only log it
            self._failures.append(error)
        finally:
            writer.close()

    async def _exchange(self, reader: StreamReader, writer: StreamWriter) -> bool:
        """One request and its answer; whether another may follow on this connection."""
        head = await _Head.read(reader)
        method, target, _ = head.first.split(" ", 2)
        request = Request(method, urllib.parse.unquote(target))
        self.log.append(request)
        if self._denied and request.matches(self._denied):
            return await self._refuse(403, request, head, reader, writer)
        chances, only = self._plan
        drawn = [k for k in KINDS if request.matches(only) and self._random.random() < chances[k]]
        if "delay" in drawn:
            self._counts["delay"] += 1
            await asyncio.sleep(self._random.uniform(*DELAY))
        if "slow_down" in drawn:
            self._counts["slow_down"] += 1
            return await self._refuse(503, request, head, reader, writer)
        # A connection of its own for every request: no kept one can turn out closed.
        up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        up_writer.write(head.raw)
        upload = asyncio.create_task(_upload(head, reader, up_writer))
        try:
            answer = await _Head.read(up_reader)
            while answer.status < 200:  # 100 Continue
                writer.write(answer.raw)
                answer = await _Head.read(up_reader)
            sound = await self._answer(request, answer, drawn, up_reader, writer)
            return sound and upload.done() and not (head.closes or answer.closes)
        finally:
            upload.cancel()
            up_writer.close()

    async def _refuse(
        self,
        status: int,
        request: Request,
        head: "_Head",
        reader: StreamReader,
        writer: StreamWriter,
    ) -> bool:
        waits = "expect" in head.fields  # and then sends no body
        if not waits:
            async for _ in head.body(reader):
                pass
        request.status = status
        phrase, text = _REFUSALS[status]
        body = text.replace("{}", request.path.split("?")[0]).encode()  # as AWS names the object
        connection = "close" if waits or head.closes else "keep-alive"
        fields = f"Content-Type: application/xml\r\nConnection: {connection}\r\n\r\n".encode()
        first = f"HTTP/1.1 {status} {phrase}\r\n".encode()
        writer.write(_with_length(first + fields, len(body)))
        writer.write(body if request.method != "HEAD" else b"")
        await writer.drain()
        return connection != "close"

    async def _answer(
        self,
        request: Request,
        answer: "_Head",
        drawn: list[str],
        reader: StreamReader,
        writer: StreamWriter,
    ) -> bool:
        """Send the answer, harmed or not; whether the connection is sound after it."""
        raw, length, pieces = answer.raw, answer.length, answer.body(reader)
        if request.method == "HEAD" or answer.status in (204, 304):
            length, pieces = 0, _one(b"")
        # Bytes that can be harmed: stores announce the length of whatever they keep.
        content = length if request.method == "GET" and answer.status in (200, 206) else 0
        harms = ("drop", "truncate", "wrong") if content else ("drop",)
        harm = next((kind for kind in harms if kind in drawn), None)
        self._counts.update([harm] if harm else [])
        if harm and not content:
            async for _ in pieces:
                pass
            return False
        if harm and content:
            start = self._random.randrange(content)
            if harm == "wrong":
                pieces = _flipped(pieces, start, start + self._random.randint(1, 4096))
            else:
                pieces = _cut(pieces, start)
                raw = _with_length(raw, start) if harm == "truncate" else raw
        request.status = answer.status
        writer.write(raw)
        async for count in _send(pieces, writer, chunked=length is None):
            request.sent += count
        return harm != "drop"


class _Head:
    """The first line and the fields of a request or an answer."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        pairs = (line.split(":", 1) for line in lines)
        self.fields = {name.lower(): value.strip() for name, value in pairs}
        self.closes = self.fields.get("connection", "").lower() == "close"
        chunked = "chunked" in self.fields.get("transfer-encoding", "").lower()
        self.length = None if chunked else int(self.fields.get("content-length", 0))
        """Bytes of the body; None when it comes in chunks."""

    @classmethod
    async def read(cls, reader: StreamReader) -> "_Head":
        return cls(await reader.readuntil(b"\r\n\r\n"))

    @property
    def status(self) -> int:
        return int(self.first.split(" ", 2)[1])

    async def body(self, reader: StreamReader) -> Pieces:
        """The body in pieces, without the sizes of chunks and trailers."""
        left = self.length
        while left is None or left > 0:
            if left is not None:
                size = min(left, PIECE)
                left -= size
            elif not (size := int((await reader.readuntil(b"\n")).split(b";")[0], 16)):
                while await reader.readuntil(b"\n") != b"\r\n":
                    pass
                return
            yield await reader.readexactly(size)
            if left is None:
                await reader.readexactly(2)


async def _upload(head: _Head, reader: StreamReader, writer: StreamWriter) -> None:
    try:
        async for _ in _send(head.body(reader), writer, chunked=head.length is None):
            pass
    except _GONE:
        writer.close()  # so that nobody waits for an answer


async def _send(pieces: Pieces, writer: StreamWriter, chunked: bool) -> AsyncIterator[int]:
    """Writes the pieces and yields how long each was."""
    async for piece in pieces:
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
        await writer.drain()
        yield len(piece)
    writer.write(b"0\r\n\r\n" if chunked else b"")
    await writer.drain()


def _with_length(raw: bytes, length: int) -> bytes:
    rest = re.sub(rb"(?im)^(content-length|transfer-encoding):.*\r\n", b"", raw)
    return rest[:-2] + b"Content-Length: %d\r\n\r\n" % length


async def _one(piece: bytes) -> Pieces:
    yield piece


async def _cut(pieces: Pieces, length: int) -> Pieces:
    async for piece in pieces:
        yield piece[:length]
        length -= len(piece)
        if length <= 0:
            return


async def _flipped(pieces: Pieces, start: int, stop: int) -> Pieces:
    position = 0
    async for piece in pieces:
        first, last = (min(max(edge - position, 0), len(piece)) for edge in (start, stop))
        stretch = bytes(byte ^ 0xFF for byte in piece[first:last])
        yield piece[:first] + stretch + piece[last:]
        position += len(piece)
