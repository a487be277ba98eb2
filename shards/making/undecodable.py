"""Say what a file holds that training will not be able to decode."""

from shards.dimensions import MOST_PIXELS, image_size

# The first bytes of what people find in place of an image.
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, which `git lfs pull` replaces by the image"),
    (b"\x1f\x8b", "a gzip file"),
    (b"PK", "a zip file"),
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"<", "an HTML or XML page"),
    (b"{", "JSON"),
)


def find_fault(content: bytes) -> str:
    """Return why the header of an image file cannot be decoded; "" when it can.

    Only the header is read. A file that is cut off or damaged further on is not found.
    """
    if size := image_size(content):
        width, height = size
        return f"more than {MOST_PIXELS:,} pixels" if width * height > MOST_PIXELS else ""
    if not content:
        return "empty"
    if content[4:12] in (b"ftypavif", b"ftypheic"):
        return "an AVIF or HEIC image"
    for start, kind in _KINDS:
        if content.lstrip().startswith(start):
            return kind
    return "no JPEG, PNG or WebP header"
