"""Find the newest picture of the views in the files that the training wrote for tensorboard."""

import io
from collections.abc import Iterator

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from engine.log.curves import VIEWS
from shards.storage import files
from shards.storage.entries import Entry, list_entries

TAGS = (VIEWS, "views")  # of the picture of the views, now and in the first release
EARLIER = "tensorboard"  # folder in RUN of the event files of the first release
MOST_FILES = 200  # event files that are looked through, from the newest on
MOST_BYTES = 256 << 20  # of an event file that is looked through
_HEAD, _SUM = 12, 4  # bytes before and behind an event: its length and checksums
_SMALLEST, _LARGEST = 300, 64 << 20  # bytes of an event that may hold a picture


def find_views(run: str) -> tuple[int, bytes] | None:
    """Find the newest picture of the views that the training logged: its step, and a PNG.

    It is read back from tensorboard's files, so that nothing has to be written twice, and runs of
    earlier releases have one too. Raises OSError.
    """
    for folder in (run, files.join(run, EARLIER)):
        found = [entry for entry in list_entries(folder) if ".tfevents." in entry.name]
        for entry in reversed(found[-MOST_FILES:]):
            if entry.size <= MOST_BYTES and (views := _find_in(folder, entry)):
                return views
    return None


def _find_in(folder: str, entry: Entry) -> tuple[int, bytes] | None:
    """Find the last picture of the views in one event file."""
    with files.open_reader(files.join(folder, entry.name)) as file:
        places = []
        while len(head := file.read(_HEAD)) == _HEAD:
            length = int.from_bytes(head[:8], "little")
            if length > _LARGEST:
                break  # the file is damaged, or is still being written
            if length >= _SMALLEST:
                places.append((file.tell(), length))
            file.seek(length + _SUM, io.SEEK_CUR)
        for place, length in reversed(places):
            file.seek(place)
            for picture in _views(file.read(length)):
                return picture
    return None


def _views(content: bytes) -> Iterator[tuple[int, bytes]]:
    try:
        event = Event.FromString(content)
    except DecodeError:
        return
    for value in event.summary.value:
        if value.tag in TAGS and value.HasField("image"):
            yield event.step, value.image.encoded_image_string
