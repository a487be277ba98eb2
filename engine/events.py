"""RUN/tensorboard: scalars and pictures as tensorboard's event files, on any storage.

Without tensorboard's own file layer, which writes an object anew for every record. A process has
one growing file on a local disk; on an object store it makes parts that never change, one PUT each.
Tensorboard reads a folder's files in the order of their names.
"""

import io
import os
import re
import socket
import threading
import time

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from shards import storage


class EventLog:
    """Event files of one process in `folder`; tensorboard forgets what others logged after `start`.

    Nothing is written before `flush`, which may run in another thread. After an OSError of its
    the events are still there and go with the next call.
    """

    def __init__(self, folder: str, start: int) -> None:
        """Lists the folder. Raises OSError."""
        self._folder, self._local = folder, storage.is_local(folder)
        names = storage.list_names(folder)
        self.files = len(names)
        """How many the folder holds."""
        # Clocks of machines differ; a restart's files come after all that are there.
        earlier = [int(m[1]) for name in names if (m := re.match(r"\D*\.tfevents\.(\d+)\.", name))]
        born = max([int(time.time()), *(second + 1 for second in earlier)])
        self._stem = f"events.out.tfevents.{born:010d}.{socket.gethostname()}.{os.getpid()}"
        self._number = 0

        self._version = _framed(Event(wall_time=time.time(), file_version="brain.Event:2"))
        restart = SessionLog(status=SessionLog.START)
        self._head = self._version + _framed(
            Event(wall_time=time.time(), step=start + 1, session_log=restart)
        )
        self._pending: list[bytes] = []  # appended to by one thread, cut by another
        self._storing = threading.Lock()
        self._size = 0  # bytes of the local file that are known to be whole

    @property
    def unwritten(self) -> int:
        """How many events are in memory only."""
        return len(self._pending)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Note one point for each name."""
        self._note(
            [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()], step
        )

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Note an RGB picture [H, W, 3]."""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        height, width, channels = pixels.shape
        image = Summary.Image(
            height=height,
            width=width,
            colorspace=channels,
            encoded_image_string=buffer.getvalue(),
        )
        self._note([Summary.Value(tag=name, image=image)], step)

    def flush(self) -> None:
        """Put what was noted since the last time in storage. Raises OSError."""
        with self._storing:
            count = len(self._pending)
            if not count:
                return
            name = f"{self._stem}.{self._number:06d}.byol"
            content = self._head + b"".join(self._pending[:count])
            if self._local:
                self._extend(storage.join(self._folder, name), content)
                self._head = b""
            else:
                # After a failure the same name again: if that got there all the same, none doubles.
                storage.write(storage.join(self._folder, name), content)
                self._head = self._version
                self._number += 1
                self.files += 1
            del self._pending[:count]

    def _extend(self, url: str, content: bytes) -> None:
        path = storage.open_filesystem(url)[1]
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "r+b" if self._size else "wb") as file:
            file.truncate(self._size)  # without the half of an event that a full disk left
            file.seek(self._size)
            file.write(content)
        self._size += len(content)

    def _note(self, values: list[Summary.Value], step: int) -> None:
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._pending.append(_framed(event))


def _framed(event: Event) -> bytes:
    """As a record of an event file: length, its checksum, the event, its checksum."""
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
