"""Run an HTTP proxy in front of a store that damages some of the requests that pass.

It runs in a thread of the test's process, so a test can read its counts and change its settings
directly. Clients are other processes or s3fs's own thread. Requests are forwarded unchanged,
including the Host header, which S3 signs.
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
PIECE = 1 << 16  # Bodies are read this many bytes at a time.

_XML = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{}</Code><Message>{}</Message></Error>'
Pieces = AsyncIterator[bytes]
_GONE = (ConnectionError, asyncio.IncompleteReadError)  # The other side has gone away.


@dataclasses.dataclass
class Request:
    """One request that arrived, and what was sent back."""

    method: str
    path: str
    """With its query, percent signs resolved."""
    status: int = 0
    """0 until an answer is sent, and for ever when it got lost."""
    sent: int = 0
    """Bytes of the answer's body."""

    def matches(self, pattern: str) -> bool:
        return re.search(pattern, f"{self.method} {self.path}") is not None


@dataclasses.dataclass(frozen=True)
class Quirk:
    """An answer that other stores, or what stands before them, give instead of carrying out."""

    status: int
    code: str
    message: str
    """`{}` in it stands for the path."""
    only: str = ".*"
    """For requests that match this pattern..."""
    header: str = ""
    """... and of whose header fields one matches this one, as "name: value", if it is not empty."""

    def concerns(self, request: Request, fields: dict[str, str]) -> bool:
        heads = (f"{name}: {value}" for name, value in fields.items())
        given = not self.header or any(re.search(self.header, head) for head in heads)
        return given and request.matches(self.only)

    def answer(self, request: Request) -> tuple[bytes, str]:
        """Return the body of the answer and its content type. A code "" stands for a web page."""
        if not self.code:
            return f"<html><body>{self.message}</body></html>".encode(), "text/html"
        message = self.message.replace("{}", request.path.split("?")[0])
        return _XML.format(self.code, message).encode(), "application/xml"


_BUSY = Quirk(503, "SlowDown", "Please reduce your request rate.")


class FaultProxy:
    """Forwards requests to `upstream` ("http://host:port") and injects `faults`.

    `faults` maps a kind of fault to its probability per request. The kinds are:

    delay      waits for DELAY before it forwards
    slow_down  answers 503 SlowDown and does not forward
    drop       closes the connection in the middle of a GET's body; for other requests, the store
               carries them out, but the answer is lost
    truncate   sends the first part of a GET's body as if it were all of it
    wrong      flips the bits of a stretch of a GET's body

    `only` and all other patterns are regular expressions that are searched for in
    "METHOD /path?query". Random numbers are drawn, in the order of arrival, for the requests that
    match `only`. A request gets at most one of drop, truncate and wrong. Requests that the quirks
    of `refuse` concern are answered as the first of these says.
    """

    def __init__(
        self,
        upstream: str,
        seed: int,
        faults: dict[str, float],
        only: str = ".*",
        address: str = "127.0.0.1",
    ) -> None:
        self._address = address
        parts = urllib.parse.urlsplit(upstream)
        self._upstream = parts.hostname, parts.port
        self._random = random.Random(seed)
        self._counts: Counter[str] = Counter()
        self.log: list[Request] = []
        self.endpoint = ""
        self._quirks: tuple[Quirk, ...] = ()
        self.set(faults, only)

    def set(self, faults: dict[str, float], only: str = ".*") -> None:
        """Replace the faults from now on. Raises ValueError for an unknown kind."""
        if unknown := faults.keys() - set(KINDS):
            raise ValueError(f"no such fault: {', '.join(sorted(unknown))}")
        self._plan = {kind: faults.get(kind, 0.0) for kind in KINDS}, only

    def refuse(self, *quirks: Quirk) -> None:
        """Answer as these quirks say from now on; none of them lets all requests pass."""
        self._quirks = quirks

    def deny(self, pattern: str) -> None:
        """Deny all requests that match this pattern from now on; "" allows all requests."""
        message = "This user may not do that to {}."  # AWS names the object too.
        self.refuse(*[Quirk(403, "AccessDenied", message, pattern)] * bool(pattern))

    def counts(self) -> dict[str, int]:
        """Return how often each kind of fault was injected."""
        return {kind: self._counts[kind] for kind in KINDS}

    def bytes_sent(self, pattern: str = ".*") -> int:
        """Count the bytes of the answers' bodies for matching requests, except refusals."""
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
        self.endpoint = f"http://{self._address}:{started.result(10)}"
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections. Raises RuntimeError if the proxy itself has failed."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        if self._failures:
            raise RuntimeError(f"the proxy failed: {self._failures}")

    async def _serve(self, started: "concurrent.futures.Future[int]") -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._converse, self._address, 0)
        started.set_result(server.sockets[0].getsockname()[1])
        await self._stop.wait()
        server.close()

    async def _converse(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (*_GONE, asyncio.CancelledError):
            pass
        except Exception as error:  # asyncio would only log the error.
            self._failures.append(error)
        finally:
            writer.close()

    async def _exchange(self, reader: StreamReader, writer: StreamWriter) -> bool:
        """Handle one request. Return whether another may follow on this connection."""
        head = await _Head.read(reader)
        method, target, _ = head.first.split(" ", 2)
        request = Request(method, urllib.parse.unquote(target))
        self.log.append(request)
        for quirk in self._quirks:
            if quirk.concerns(request, head.fields):
                return await self._refuse(quirk, request, head, reader, writer)
        chances, only = self._plan
        drawn = [k for k in KINDS if request.matches(only) and self._random.random() < chances[k]]
        if "delay" in drawn:
            self._counts["delay"] += 1
            await asyncio.sleep(self._random.uniform(*DELAY))
        if "slow_down" in drawn:
            self._counts["slow_down"] += 1
            return await self._refuse(_BUSY, request, head, reader, writer)
        # Every request gets a new connection, because a reused one might have been closed.
        up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        up_writer.write(head.raw)
        upload = asyncio.create_task(_upload(head, reader, up_writer))
        try:
            answer = await _Head.read(up_reader)
            while answer.status < 200:  # The store sends 100 Continue before its answer.
                writer.write(answer.raw)
                answer = await _Head.read(up_reader)
            sound = await self._answer(request, answer, drawn, up_reader, writer)
            return sound and upload.done() and not (head.closes or answer.closes)
        finally:
            upload.cancel()
            up_writer.close()

    async def _refuse(
        self,
        quirk: Quirk,
        request: Request,
        head: "_Head",
        reader: StreamReader,
        writer: StreamWriter,
    ) -> bool:
        waits = "expect" in head.fields  # A client that waits for 100 Continue sends no body.
        if not waits:
            async for _ in head.body(reader):
                pass
        request.status = quirk.status
        body, kind = quirk.answer(request)
        connection = "close" if waits or head.closes else "keep-alive"
        fields = f"Content-Type: {kind}\r\nConnection: {connection}\r\n\r\n".encode()
        first = f"HTTP/1.1 {quirk.status} {quirk.code or 'OK'}\r\n".encode()
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
        """Send the answer, damaged or not. Return whether the connection can still be used."""
        raw, length, pieces = answer.raw, answer.length, answer.body(reader)
        if request.method == "HEAD" or answer.status in (204, 304):
            length, pieces = 0, _one(b"")
        # Only bodies of known length can be damaged. Stores announce the length of all objects.
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
        """Length of the body in bytes; None when it comes in chunks."""

    @classmethod
    async def read(cls, reader: StreamReader) -> "_Head":
        return cls(await reader.readuntil(b"\r\n\r\n"))

    @property
    def status(self) -> int:
        return int(self.first.split(" ", 2)[1])

    async def body(self, reader: StreamReader) -> Pieces:
        """Yield the body in pieces, without chunk sizes and trailers."""
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
        writer.close()  # Otherwise the proxy would wait for the store's answer.


async def _send(pieces: Pieces, writer: StreamWriter, chunked: bool) -> AsyncIterator[int]:
    """Write the pieces, and yield the length of each."""
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
