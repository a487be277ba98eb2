"""Compute the digests that identify data sets, recipes and weights."""

import hashlib


def digest(content: bytes | str, digits: int = 16) -> str:
    """Return the first `digits` hex digits of the content's SHA-256, which has 64.

    Text is encoded as UTF-8.
    """
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:digits]
