"""Write scalars, pictures and texts as tensorboard's event files, on any storage.

A run's own files lie in RUN itself, so that tensorboard calls the run by the name of its folder.
Earlier releases wrote to RUN/tensorboard.

Tensorboard's own file layer is not used, because it rewrites a whole object for every record. On a
local disk each process has one growing file. On an object store each process writes parts that
never change, with one PUT each. In events.out.tfevents.TIME.HOST.PID.000003-00000120.byol, 3 is the
number of the part, counted from 0. Step 120 is the last step whose scalars are in this part or an
earlier one. Tensorboard reads files in the order of their names.
"""

import io
import os
import re
import socket
import struct
import threading
import time
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from engine.log.journal import pause
from shards.errors import printable
from shards.png import encode_png
from shards.storage import files, local_files
from shards.storage.space import naming_space

_HEAD = struct.Struct("<Q")  # the length of an event, which stands before it
_AROUND = 16  # bytes of an event's record beside the event: its length and two checksums of 4


class EventLog:
    """Write the event files of one process to `folder`.

    The first of them makes tensorboard drop what earlier processes logged after step `start`,
    because training makes those steps again. Nothing is written before `flush`, which may run in
    another thread. When `flush` raises OSError the events are kept, and the next call writes them.
    """

    def __init__(self, folder: str, start: int | None) -> None:
        """List the folder, but write nothing. Raises OSError.

        When `start` is None nothing is dropped, and each process may log any steps in any order.
        """
        self._folder, self._local = folder, files.is_local(folder)
        names = [name for name in files.list_names(folder) if ".tfevents." in name]
        newest = files.join(folder, names[-1]) if names else ""
        self.reached = _reached(newest, start) if newest and start is not None else 0
        """The last step whose scalars were added, by this process or an earlier one."""
        self._files = len(names)
        # A restart's files must sort after all earlier ones, but the clocks of machines differ.
        earlier = [int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))]
        born = max([int(time.time()), *(second + 1 for second in earlier)])
        self._stem = f"events.out.tfevents.{born:010d}.{socket.gethostname()}.{os.getpid()}"
        self._number = 0

        self._version = _framed(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._head = self._version
        if start is not None:
            restart = SessionLog(status=SessionLog.START)
            event = Event(wall_time=time.time(), step=start + 1, session_log=restart)
            self._head += _framed(event)
        self._pending: list[_Noted] = []  # one thread appends, another removes from the front
        self._batch: list[_Noted] = []  # events that `flush` is writing or failed to write
        self._storing = threading.Lock()
        self._size = 0  # bytes of the local file, without those of a failed attempt
        self._flushed = time.monotonic()

    @property
    def due(self) -> bool:
        """Return whether it is time for a flush.

        The more files there are the longer it takes, because tensorboard lists the folder again for
        each file.
        """
        return time.monotonic() - self._flushed >= pause(self._files)

    @property
    def unwritten(self) -> int:
        """Return how many events are in memory only."""
        return len(self._batch) + len(self._pending)

    @property
    def unrepeatable(self) -> bool:
        """Return whether some unwritten events cannot be restored from metrics.jsonl.

        Those are pictures, and scalars that were added to a step that had scalars before.
        """
        return any(noted.unrepeatable for noted in [*self._batch, *self._pending])

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add one point at `step` for each name."""
        points = [
            Summary.Value(tag=printable(name), simple_value=value) for name, value in values.items()
        ]
        again = step <= self.reached
        self.reached = max(self.reached, step)
        if points:
            self._note(points, step, unrepeatable=again)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Add an RGB picture [H, W, 3]."""
        height, width, channels = pixels.shape
        image = Summary.Image(
            height=height,
            width=width,
            colorspace=channels,
            encoded_image_string=encode_png(pixels),
        )
        self._note([Summary.Value(tag=name, image=image)], step, unrepeatable=True)

    def show(self, *values: Summary.Value, step: int) -> None:
        """Add what every start of a run writes again, such as the recipe."""
        self._note(list(values), step, unrepeatable=False)

    def flush(self) -> None:
        """Write the events that were added since the last flush to storage. Raises OSError."""
        self._flushed = time.monotonic()
        with self._storing:
            # A batch that failed is written again under the same name. So no event appears twice
            # if the failed attempt reached the storage after all.
            self._put_batch()
            self._batch = self._pending[:]
            del self._pending[: len(self._batch)]
            self._put_batch()

    def _put_batch(self) -> None:
        if not self._batch:
            return
        content = self._head + b"".join(noted.content for noted in self._batch)
        name = f"{self._stem}.{self._number:06d}"
        if self._local:
            self._extend(files.join(self._folder, f"{name}.byol"), content)
            self._head = b""
        else:
            name = f"{name}-{self._batch[-1].reached:08d}.byol"
            files.write(files.join(self._folder, name), content)
            self._head = self._version
            self._number += 1
            self._files += 1
        self._batch = []

    def _extend(self, url: str, content: bytes) -> None:
        """Append to the local file, after removing what a failed attempt may have left there."""
        path = files.local_path(url)
        if self._size and not os.path.exists(path):  # somebody moved it away
            self._size, content = 0, self._version + content
        local_files.make_folder_of(path)
        with (
            naming_space(path, lambda: len(content), path),
            open(path, "r+b" if self._size else "wb") as file,
        ):
            file.truncate(self._size)
            file.seek(self._size)
            file.write(content)
        self._size += len(content)

    def _note(self, values: list[Summary.Value], step: int, unrepeatable: bool) -> None:
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._pending.append(_Noted(self.reached, unrepeatable, _framed(event)))


class _Noted(NamedTuple):
    reached: int  # the log's `reached` when this event was added
    unrepeatable: bool
    content: bytes


def _reached(newest: str, start: int) -> int:
    """Return the last step, at most `start`, whose scalars are in the files up to `newest`."""
    if part := re.search(r"-(\d{8,18})\.byol$", newest):
        return min(int(part[1]), start)
    return min(_last_step(files.local_path(newest)), start) if files.is_local(newest) else start


def _last_step(path: str) -> int:
    """Return the step of the last whole event in a local file, of which a crash may cut the end.

    It is 0 when there is none.
    """
    place, length = 0, 0  # of the last whole event
    with open(path, "rb") as file:
        size, start = os.fstat(file.fileno()).st_size, 0
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            end = start + _AROUND + _HEAD.unpack(head)[0]
            if end > size:
                break
            place, length, start = start + _AROUND - 4, end - start - _AROUND, end
            file.seek(end)
        file.seek(place)
        try:
            last = Event.FromString(file.read(length))
        except DecodeError:
            return 0
    picture = any(value.HasField("image") for value in last.summary.value)
    return int(last.step) - picture  # A picture stands before the scalars of its step.


def _framed(event: Event) -> bytes:
    """Encode an event as a record of an event file: length, checksum, event, checksum."""
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
