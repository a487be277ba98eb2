"""Large objects written as a stream: on S3 in parts, several of them on their way at once."""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from shards.storage import files, local_files
from shards.storage.failures import explain

PARALLEL = 4  # parts on their way at once; with the one being filled, memory for 80 MiB
GROWTH = 1000  # parts after which they double: S3 takes 10,000, and 9,000 hold 8 TiB

_Content = bytes | bytearray | memoryview
_Write = Callable[[memoryview], object]


class Stream:
    """Takes the bytes of one object; `length`, and the CRC32 `crc`, are of those so far."""

    def __init__(self, write: _Write) -> None:
        self._write = write
        self.length = 0
        self.crc = 0

    def write(self, content: _Content) -> int:
        """Take some bytes, and copy those that are not sent at once. Raises OSError."""
        view = memoryview(content).cast("B")
        self._write(view)
        self.length += len(view)
        self.crc = zlib.crc32(view, self.crc)
        return len(view)

    def tell(self) -> int:
        return self.length

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing: the object is there when the block that `open_writer` began ends."""


@contextmanager
def open_writer(url: str, part: int = files.PART) -> Iterator[Stream]:
    """A stream whose object is there, whole, when the block ends; if it raises, never.

    On a local disk the file's folders are made when they are missing, and the file is synced: what
    relies on it, such as the removal of an older one, may follow at once. On stores other than
    these and S3, fsspec's own files are used, and a failed one may be seen before it is removed.

    Args:
        part: Bytes of the first parts on S3, which takes none below 5 MiB but the last. The memory
            needed is `PARALLEL` + 1 times that.

    Raises OSError naming the URL, after a bounded number of tries.
    """
    with _target(url, part) as write:
        yield Stream(write)


def _target(url: str, part: int) -> AbstractContextManager[_Write]:
    if files.is_local(url):
        return _local(url)
    return _s3(url, part) if files.is_s3(url) else _other(url)


@contextmanager
def _local(url: str) -> Iterator[_Write]:
    path = files.open_filesystem(url)[1]
    with contextlib.ExitStack() as stack:
        with _named(url):
            file, name = stack.enter_context(local_files.new_file(path))
        yield _named(url)(file.write)
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
        with contextlib.suppress(Exception):  # the error on its way is the one that counts
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
    """An object of S3: a PUT if it is smaller than a part, a multipart upload otherwise."""

    def __init__(self, url: str, part: int) -> None:
        self._url, self._part = url, part
        self._filesystem, self._path = files.client(url)
        bucket, key, _ = self._filesystem.split_path(self._path)
        self._object = {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._length = 0
        self._threads = ThreadPoolExecutor(PARALLEL, thread_name_prefix="upload")
        self._sent: set[Future[dict[str, Any]]] = set()
        self._parts: list[dict[str, Any]] = []  # those that arrived
        self._number = 0

    def write(self, view: memoryview) -> None:
        while len(view):
            size = self._part << self._number // GROWTH
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
        """Leave nothing. A part that came after the abort would stay: so they are waited for."""
        self._threads.shutdown()
        if "UploadId" in self._object:
            with contextlib.suppress(OSError):  # the error on its way is the one that counts
                self._call("abort_multipart_upload")

    def _send(self) -> None:
        if "UploadId" not in self._object:
            self._object["UploadId"] = self._call("create_multipart_upload")["UploadId"]
        self._await(PARALLEL - 1)
        self._number += 1
        self._sent.add(self._threads.submit(self._put, self._number, self._buffer))
        self._buffer = bytearray()

    def _put(self, number: int, content: bytearray) -> dict[str, Any]:
        answer = self._call("upload_part", content, PartNumber=number)
        # A store that was asked to sum with SHA256 wants to see the sums at the end.
        found = {name: answer[name] for name in ("ETag", "ChecksumSHA256") if name in answer}
        return {"PartNumber": number} | found

    def _await(self, count: int) -> None:
        """Wait until at most `count` parts are on their way. Raises what a part raised."""
        while len(self._sent) > count:
            done, self._sent = wait(self._sent, return_when=FIRST_COMPLETED)
            self._parts += [future.result() for future in done]

    def _complete(self) -> None:
        parts = sorted(self._parts, key=lambda part: int(part["PartNumber"]))
        try:
            self._call("complete_multipart_upload", MultipartUpload={"Parts": parts})
        except FileNotFoundError:  # no such upload: a try whose answer got lost has completed it
            if self._call("head_object")["ContentLength"] != self._length:
                raise

    def _call(self, method: str, content: bytearray | None = None, **options: Any) -> Any:
        """One request. s3fs keeps from it what its method does not know, as a HEAD the upload."""
        seconds = 600.0  # a store may join parts for minutes
        if content is not None:
            options["Body"], seconds = content, 60 + len(content) / 1e6
        call = self._filesystem.call_s3
        return files.retry(
            self._url, lambda: call(method, timeout=seconds, **self._object, **options)
        )


@contextmanager
def _named(url: str) -> Iterator[None]:
    """OSError naming the URL in place of other errors."""
    place = files.redact(url)
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and place in str(error):
            raise
        failure = explain(error, url)
        raise failure.kind(f"{place}: {failure.reason}") from error
