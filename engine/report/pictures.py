"""Put pictures into the page itself."""

import base64
import io

from PIL import Image

from engine.report.html import Html, tag
from shards.png import decode_png
from shards.signatures import PNG

WIDEST, TALLEST = 1600, 3200  # pixels of a picture on the page
MOST_PIXELS = 50_000_000  # of a picture that is read
PLAIN_BYTES = 300_000  # a PNG of more bytes becomes a JPEG


def embed(content: bytes, description: str) -> Html:
    """Return a PNG as a picture in the page, made smaller if it is large.

    Raises ValueError when it is none, or has too many pixels.
    """
    if content[: len(PNG)] != PNG or len(content) < 33:
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
