"""Put pictures into the page, and find the newest picture of the views in tensorboard's files."""

import base64
import io
from collections.abc import Iterator

from google.protobuf.message import DecodeError
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event

from engine.report.html import Html, tag
from engine.state.layout import TENSORBOARD
from shards.png import SIGNATURE, decode_png
from shards.storage import files
from shards.storage.entries import Entry, list_entries

VIEWS = "views"  # tag of the picture that the training logs
WIDEST, TALLEST = 1600, 3200  # pixels of a picture on the page
MOST_PIXELS = 50_000_000  # of a picture that is read
PLAIN_BYTES = 300_000  # a PNG of more bytes becomes a JPEG
MOST_FILES = 200  # event files that are looked through, from the newest on
MOST_BYTES = 256 << 20  # of an event file that is looked through
_HEAD, _SUM = 12, 4  # bytes before and behind an event: its length and checksums
_SMALLEST, _LARGEST = 300, 64 << 20  # bytes of an event that may hold a picture


def embed(content: bytes, description: str) -> Html:
    """Return a PNG as a picture in the page, made smaller if it is large.

    Raises ValueError when it is none, or has too many pixels.
    """
    if content[: len(SIGNATURE)] != SIGNATURE or len(content) < 33:
        raise ValueError("it is no PNG")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    if not 0 < width * height <= MOST_PIXELS:
        raise ValueError(f"it has {width:,} x {height:,} pixels")
    try:
        picture = Image.fromarray(decode_png(content)).convert("RGB")
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"it is damaged ({type(error).__name__})") from None
    picture.thumbnail((WIDEST, TALLEST))
    kind, encoded = "png", _encode(picture, "PNG")
    if len(encoded) > PLAIN_BYTES:
        kind, encoded = "jpeg", _encode(picture, "JPEG", quality=85)
    data = Html(f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}")
    look = "small" if picture.width < 500 else None  # it is shown larger, with sharp pixels
    return tag(
        "img", src=data, alt=description, class_=look, width=picture.width, height=picture.height
    )


def _encode(picture: Image.Image, form: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def find_views(run: str) -> tuple[int, bytes] | None:
    """Find the newest picture of the views that the training logged: its step, and a PNG.

    It is read back from tensorboard's files, so that nothing has to be written twice, and runs of
    earlier releases have one too. Raises OSError.
    """
    folder = files.join(run, TENSORBOARD)
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
        if value.tag == VIEWS and value.HasField("image"):
            yield event.step, value.image.encoded_image_string
