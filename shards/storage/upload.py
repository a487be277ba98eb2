"""Write large objects as a stream. On S3 they go in parts, several of them at once."""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from shards.storage import files, local_files
from shards.storage.failures import explain, http_status
from shards.storage.retries import retry
from shards.storage.space import naming_space

PARALLEL = 4  # This many parts are sent at once. With the one being filled they take 80 MiB.
WHOLE = 1 << 30  # Where a store takes no parts, objects up to this many bytes go in one request.
GROWTH = 1000  # Parts double in size after this many. S3 takes 10,000; 9,000 hold 8 TiB.

_Content = bytes | bytearray | memoryview
_Write = Callable[[memoryview], object]


class Stream:
    """A writable stream for the bytes of one object.

    `length` and `crc` are the number and the CRC32 of the bytes written so far.
    """

    def __init__(self, write: _Write) -> None:
        self._write = write
        self.length = 0
        self.crc = 0
        self.failure: OSError | None = None

    def write(self, content: _Content) -> int:
        """Write some bytes. Bytes that are not sent at once are copied. Raises OSError."""
        view = memoryview(content).cast("B")
        try:
            self._write(view)
        except OSError as error:
            self.failure = error
            raise
        self.length += len(view)
        self.crc = zlib.crc32(view, self.crc)
        return len(view)

    def tell(self) -> int:
        return self.length

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing. The object appears when the block of `open_writer` ends."""


@contextmanager
def open_writer(url: str, part: int = files.PART) -> Iterator[Stream]:
    """Open a stream whose complete object appears when the block ends.

    If the block raises, the object never appears. On a local disk, missing folders are created and
    the file is synced, so an older file may be removed right after the block. Stores other than
    local disks and S3 use fsspec's own files, where a failed object may be visible before it is
    removed.

    Args:
        part: Size of the first parts on S3, in bytes. S3 takes no part below 5 MiB except the
            last. The stream needs `PARALLEL` + 1 times this much memory.

    Raises OSError naming the URL, after a bounded number of tries.
    """
    with _target(url, part) as write:
        stream = Stream(write)
        try:
            yield stream
        except Exception:
            if stream.failure is not None:  # torch.save replaces it by an error of its own
                raise stream.failure from stream.failure.__cause__
            raise


def _target(url: str, part: int) -> AbstractContextManager[_Write]:
    if files.is_local(url):
        return _local(url)
    return _s3(url, part) if files.is_s3(url) else _other(url)


@contextmanager
def _local(url: str) -> Iterator[_Write]:
    path, needed = files.local_path(url), 0

    @_named(url)
    def write(view: memoryview) -> None:
        nonlocal needed
        needed += len(view)
        file.write(view)

    with naming_space(path, lambda: needed, path), contextlib.ExitStack() as stack:
        with _named(url):
            file, name = stack.enter_context(local_files.new_file(path))
        yield write
        with _named(url):
            local_files.sync(file)
            os.replace(name, path)


@contextmanager
def _other(url: str) -> Iterator[_Write]:
    filesystem, path = files.open_filesystem(url)
    with _named(url):
        file = filesystem.open(path, "wb")
    try:
        yield _named(url)(file.write)
        with _named(url):
            file.close()
    except BaseException:
        with contextlib.suppress(Exception):  # The caller must see the first error.
            file.close()
            filesystem.rm_file(path)
        raise


@contextmanager
def _s3(url: str, part: int) -> Iterator[_Write]:
    upload = _Upload(url, part)
    try:
        yield upload.write
        upload.finish()
    except BaseException:
        upload.abort()
        raise


class _Upload:
    """An upload to S3: one PUT if the object is smaller than a part, else a multipart upload.

    A store without multipart uploads gets one PUT in any case, of at most WHOLE bytes.
    """

    def __init__(self, url: str, part: int) -> None:
        self._url, self._part = url, part
        self._filesystem, self._path = files.client(url)
        bucket, key, _ = self._filesystem.split_path(self._path)
        self._object = {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._length = 0
        self._threads = ThreadPoolExecutor(PARALLEL, thread_name_prefix="upload")
        self._sent: set[Future[dict[str, Any]]] = set()
        self._parts: list[dict[str, Any]] = []  # The parts that have arrived.
        self._number = 0
        self._in_parts = True

    def write(self, view: memoryview) -> None:
        while len(view):
            size = self._part << self._number // GROWTH if self._in_parts else WHOLE
            taken = view[: size - len(self._buffer)]
            self._buffer += taken
            self._length += len(taken)
            view = view[len(taken) :]
            if len(self._buffer) == size:
                self._send()

    def finish(self) -> None:
        if "UploadId" in self._object:
            if self._buffer:
                self._send()
            self._await(0)
            self._complete()
        else:
            self._call("put_object", self._buffer)
        self._threads.shutdown()
        self._filesystem.invalidate_cache(self._path)

    def abort(self) -> None:
        """Remove all parts from the store.

        Wait for the parts under way first, because a part that arrives after the abort would stay.
        """
        self._threads.shutdown()
        if "UploadId" in self._object:
            with contextlib.suppress(OSError):  # The caller must see the first error.
                self._call("abort_multipart_upload")

    def _send(self) -> None:
        if "UploadId" not in self._object and not self._begin():
            return
        self._await(PARALLEL - 1)
        self._number += 1
        self._sent.add(self._threads.submit(self._put, self._number, self._buffer))
        self._buffer = bytearray()

    def _begin(self) -> bool:
        """Begin a multipart upload. Return False when the store has none and WHOLE is not reached.

        Raises OSError when the store has none and the object is longer.
        """
        if not self._in_parts:
            raise OSError(
                f"{files.redact(self._url)}: the store has no multipart uploads, which an object "
                f"of more than {WHOLE >> 20} MiB needs: take a store that has them"
            )
        upload = self._call("create_multipart_upload", optional=True)
        self._in_parts = upload is not None
        if upload is not None:
            self._object["UploadId"] = upload["UploadId"]
        return self._in_parts

    def _put(self, number: int, content: bytearray) -> dict[str, Any]:
        answer = self._call("upload_part", content, PartNumber=number)
        # A store that computes SHA256 checksums requires them again when the upload completes.
        found = {name: answer[name] for name in ("ETag", "ChecksumSHA256") if name in answer}
        return {"PartNumber": number} | found

    def _await(self, count: int) -> None:
        """Wait until at most `count` parts are under way. Raises what sending a part raised."""
        while len(self._sent) > count:
            done, self._sent = wait(self._sent, return_when=FIRST_COMPLETED)
            self._parts += [future.result() for future in done]

    def _complete(self) -> None:
        parts = sorted(self._parts, key=lambda part: int(part["PartNumber"]))
        try:
            self._call("complete_multipart_upload", MultipartUpload={"Parts": parts})
        except FileNotFoundError:
            # There is no such upload any more: an earlier try completed it, but its answer got
            # lost.
            if self._call("head_object")["ContentLength"] != self._length:
                raise

    def _call(
        self,
        method: str,
        content: bytearray | None = None,
        optional: bool = False,
        **options: Any,
    ) -> Any:
        """Send one request for the object. Return None if it is optional and the store lacks it.

        s3fs drops options that the method does not accept, such as the upload's ID for a HEAD.
        """
        seconds = 600.0  # A store may take minutes to join the parts.
        if content is not None:
            options["Body"], seconds = content, 60 + len(content) / 1e6

        def call() -> Any:
            try:
                return self._filesystem.call_s3(method, timeout=seconds, **self._object, **options)
            except OSError as error:
                if optional and http_status(error) in (405, 501):
                    return None
                raise

        return retry(self._url, call)


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Replace any error in the block by an OSError that names the URL."""
    place = files.redact(url)
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and place in str(error):
            raise
        failure = explain(error, url)
        raise failure.kind(f"{place}: {failure.reason}") from error
