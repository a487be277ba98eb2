"""Say what a file holds that cannot be decoded."""

from shards.dimensions import image_size
from shards.signatures import JPEG, JPEG_2000, PNG, TIFF, is_webp

# The first bytes of what people find in place of an image.
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, which `git lfs pull` replaces by the image"),
    (b"\x1f\x8b", "a gzip file"),
    (b"PK", "a zip file"),
    (b"<", "an HTML or XML page"),
    (b"{", "JSON"),
)
_FORMATS = (
    (JPEG, "JPEG"),
    (PNG, "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    *((start, "TIFF") for start in TIFF),
    *((start, "PNM") for start in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"PF", b"Pf")),
    (b"qoif", "QOI"),
    (JPEG_2000, "JPEG 2000"),
    (b"\0\0\0\x0cjP", "JPEG 2000"),
)


def find_fault(content: bytes) -> str:
    """Return why the header of a file is not that of an image; "" when it is one.

    Only the header is read. A file that is cut off or damaged further on is not found.
    """
    if image_size(content):
        return ""
    if not content:
        return "empty"
    for start, kind in _KINDS:
        if content.lstrip().startswith(start):
            return kind
    if content[4:8] == b"ftyp":
        return "an AVIF or HEIC image that Pillow cannot read"
    if (name := name_format(content)) != "image":
        return f"a damaged {name}"
    return "no header of an image"


def name_format(content: bytes) -> str:
    """Name the format that a file's first bytes belong to; "image" when they are not known."""
    if content[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    if is_webp(content):
        return "WebP"
    return next((name for start, name in _FORMATS if content.startswith(start)), "image")
