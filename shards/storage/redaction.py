"""Show URLs without the secrets in them, also where they are mistyped."""

import re

# Something like the beginning of a URL, but without "://": a scheme and a wrong mark, or any word
# with a colon and a slash. After a known scheme, the weak marks may also belong to a path.
_KNOWN = r"(?:s3a?|gcs?|gs|r2|minio|oss|abfss?|az|adl|wasbs?|https?|s?ftp|ssh|hdfs|memory)"
_COLON = r"(?:[:;\uff1a]|%3A)"
_STRONG = rf"(?:{_COLON}[\s:/\\]*|[^\w\s/\\]{{0,2}}\s*[/\\]{{2,}}\s*)"
_MISTYPED = re.compile(
    rf"(?P<scheme>\s*(?:(?P<known>{_KNOWN})(?:(?P<strong>{_STRONG})|[.,/\\]+)|"
    rf"[a-z][a-z0-9+.-]*(?P<slash>{_COLON}+\s*[/\\][\s/\\]*)))(?P<rest>.*)$",
    re.IGNORECASE | re.DOTALL,
)
# It is refused as the value of a field, and so is any word with a colon and slashes.
SLIP = re.compile(rf"\s*(?:({_KNOWN}){_STRONG}|([a-z][a-z0-9+.-]+){_COLON}\s*[/\\])", re.IGNORECASE)


_WITH_PORTS = ("http", "https", "ftp", "sftp", "ssh", "hdfs", "webhdfs")
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # As in abfs://CONTAINER@ACCOUNT/folder.
_PATHS = ("file", "local", "memory")  # Their URLs may begin with more slashes.
_COLONS = re.compile(":|%3A", re.IGNORECASE)
_QUERY = re.compile(r"\?[\w-]+=")


def redact(url: str) -> str:
    """Return the URL without user, password and query, which may be secret.

    A mistyped URL such as s3:/USER:PASSWORD@bucket is a path to everybody else, but its secrets are
    left out too. Other paths are returned unchanged.
    """
    scheme, mark, _ = url.partition("://")
    mistyped = _MISTYPED.match(url)
    # A password may hold "://", too.
    if mark and not (mistyped and mistyped.end("scheme") <= len(scheme)):
        return f"{scheme}://{split(url)[1]}"
    if mistyped:
        strong = bool(mistyped["strong"] or mistyped["slash"])
        known = (mistyped["known"] or "http").lower()
        return mistyped["scheme"] + _split(mistyped["rest"], known, strong)[1]
    return url


def user_info(url: str) -> str:
    """Return the user and password that stand before a URL's host, or "" if there are none."""
    return split(url)[0] if "://" in url else ""


def has_query(place: str) -> bool:
    """Return whether the part of an s3 URL after `://` has a query, which may be secret.

    A `?` alone does not make a query, because most `?` in s3 URLs belong to object names.
    """
    return _QUERY.search(place) is not None


def split(url: str) -> tuple[str, str, str]:
    """Split a URL into user and password, host and path, and query."""
    before, _, rest = url.partition("://")
    words = re.findall(r"[a-z][a-z0-9+.-]*", before.lower())  # There may be a quote, or a space.
    return _split(rest, words[-1] if words else "", strong=True)


def _split(rest: str, scheme: str, strong: bool) -> tuple[str, str, str]:
    """Split what follows the scheme of a URL as `split` does.

    Where a password holds what has a meaning in URLs, too much is taken for it, not too little.

    Args:
        strong: Whether this is hardly a path, so that an @ without a colon tells a user as well.
    """
    slashes = "" if scheme in _PATHS else rest[: len(rest) - len(rest.lstrip("/\\ "))]
    rest = rest[len(slashes) :]
    rest, query = _cut_query(rest, scheme, strong, before_colon=True)
    first = rest.partition("/")[0]
    colon = _COLONS.search(first)
    mark = rest.rfind("@")
    user = ""
    if colon and not first.startswith("arn:"):
        length = 1 if mark >= 0 else 3
        mark = mark if mark >= 0 else rest.rfind("%40")
        port = scheme in _WITH_PORTS and re.match(r"[^/@]*:\d+(/|$)", rest)
        if mark > colon.start() and not port:
            user, rest = rest[:mark], rest[mark + length :]
            if "?" in user.partition("@")[2]:  # Nobody can tell where the password ends.
                rest = "..."
    elif "@" in first and strong and scheme not in _CONTAINERS:
        user, _, _ = first.rpartition("@")
        rest = rest[len(user) + 1 :]
    rest, found = _cut_query(rest, scheme, strong, before_colon=False)
    return user, rest if user or query else slashes + rest, query or found


def _cut_query(rest: str, scheme: str, strong: bool, before_colon: bool) -> tuple[str, str]:
    """Split off the query, if there is one and, if `before_colon`, it begins before any colon."""
    named = scheme in ("s3", "s3a") or not strong  # A plain ? may belong to a name.
    found = _QUERY.search(rest) if named else re.search(r"\?", rest)
    if not found or (before_colon and _COLONS.search(rest[: found.start()])):
        return rest, ""
    place, _, query = rest.partition("?")
    return place, query
