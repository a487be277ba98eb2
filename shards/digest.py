"""Digests: how data sets, recipes and weights are told apart by name."""

import hashlib


def digest(content: bytes | str, digits: int = 16) -> str:
    """The first hex digits of a content's SHA-256, text in UTF-8; `digits` is 64 for all."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:digits]
