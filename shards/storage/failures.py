"""Turn an exception of a storage library into one line for users, and say whether to retry."""

import errno
import re
import socket
from typing import Any, NamedTuple

from shards.storage import space

LONGEST = 400  # A reason is cut to this many characters.

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_REGION = "the bucket is in another region: set AWS_DEFAULT_REGION"
_MENDS = {  # The keys are error codes of S3 answers and names of botocore exceptions.
    "NoSuchBucket": "create the bucket, or correct the URL",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "RequestTimeTooSkewed": "set this machine's clock",
    "NoCredentialsError": f"{_CREDENTIALS}, or FSSPEC_S3_ANON=true for a public bucket",
    "PartialCredentialsError": _CREDENTIALS,
    "ProfileNotFound": "correct AWS_PROFILE",
    "EndpointConnectionError": "is AWS_ENDPOINT_URL right, and does a server answer there?",
}
_DENIED = f"the credentials are not accepted or do not allow this: {_CREDENTIALS}"

# These S3 error codes come with a 4xx status, but the same request may succeed later.
_PASSING = {
    *("RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"),
    *("Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"),
}
_PASSING_STATUSES = {408, 409, 425, 429}

# These botocore exceptions do not come from wrong settings, so a retry may help.
_PASSING_KINDS = {
    *("HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseStreamingError"),
    *("CredentialRetrievalError", "MetadataRetrievalError", "FlexibleChecksumError"),
}
_MISTAKES = (ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError)
FULL = {*space.FULL, errno.EROFS}  # With these, every way of writing fails.
_FINAL = (
    *(FileNotFoundError, FileExistsError, PermissionError),
    *(IsADirectoryError, NotADirectoryError),
)


# Something like the beginning of a URL, but without "://", then a user and a password, or a query.
_MISTYPED = re.compile(
    r"(?P<scheme>\s*(?:s3a?|gcs?|gs|abfss?|az|https?|ftp|memory)[:;.,/\\]+)"
    r"(?:[^@]*:[^@]*@)?(?P<place>.*)$",
    re.IGNORECASE | re.DOTALL,
)


class Failure(NamedTuple):
    """The reason why a call to a storage library failed."""

    reason: str  # one line, without the secrets of any URL
    hopeless: bool  # True when the same call would fail again
    kind: type[OSError]  # the exception class that the caller raises


def redact(url: str) -> str:
    """Return the URL without user, password and query, which may be secret.

    A mistyped URL such as s3:/USER:PASSWORD@bucket is a path to everybody else, but its secrets are
    left out too. Other paths are returned unchanged.
    """
    scheme, mark, _ = url.partition("://")
    if mark:
        return f"{scheme}://{_split(url)[1]}"
    if mistyped := _MISTYPED.match(url):
        place = mistyped["place"]
        return mistyped["scheme"] + (place.partition("?")[0] if has_query(place) else place)
    return url


def user_info(url: str) -> str:
    """Return the user and password that stand before a URL's host, or "" if there are none."""
    return _split(url)[0] if "://" in url else ""


def has_query(place: str) -> bool:
    """Return whether the part of an s3 URL after `://` has a query, which may be secret.

    A `?` alone does not make a query, because most `?` in s3 URLs belong to object names.
    """
    return re.search(r"\?[\w-]+=", place) is not None


def _split(url: str) -> tuple[str, str, str]:
    """Split a URL into user and password, host and path, and query."""
    scheme, _, rest = url.partition("://")
    query = ""
    if scheme not in ("s3", "s3a") or has_query(rest):
        rest, _, query = rest.partition("?")
    if re.match(r"/+[^/@]*:[^@]*@", rest) and scheme not in ("file", "local"):
        rest = rest.lstrip("/")  # mistyped, as in s3:///USER:PASSWORD@bucket
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        user, _, authority = authority.rpartition("@")
        return user, authority + slash + path, query
    if "@" in path and re.match(r"(?!arn:)[^:]*:(.*\D.*)?$", authority):
        # What follows the colon is not a port, so this is a password that contains a slash.
        user, _, place = rest.partition("@")
        return user, place, query
    return "", rest, query


def explain(error: Exception, url: str) -> Failure:
    """Describe an exception that a storage library raised for `url`."""
    kind = next((kind for kind in _FINAL if isinstance(error, kind)), OSError)
    code, status, message = _answer(error)
    if not status:
        return _without_answer(error, url, kind)
    text = f"{message.rstrip('.')} ({code})"
    if status in (401, 403):
        text, kind = f"access denied: {text}: {_MENDS.get(code, _DENIED)}", PermissionError
    elif status == 412:
        # An exclusive create found an object. s3fs recognizes this only in AWS's own wording.
        kind = FileExistsError
    elif code in _MENDS:  # A missing bucket must not look like a missing file.
        text, kind = f"{text}: {_MENDS[code]}", OSError
    passing = status >= 500 or code in _PASSING or status in _PASSING_STATUSES
    return Failure(_line(text, url), not passing or status == 501, kind)


def is_beyond_end(error: Exception) -> bool:
    """Return whether S3 refused a range because the object ends before it."""
    return _answer(error)[1] == 416


def _answer(error: Exception) -> tuple[str, int, str]:
    """Return the error code, HTTP status and message of S3's answer.

    The status is 0 when S3 gave no answer.
    """
    for candidate in (error, error.__cause__):
        response: Any = getattr(candidate, "response", None)
        if isinstance(response, dict) and "Error" in response:
            told, head = response["Error"], response.get("ResponseMetadata", {})
            status = int(head.get("HTTPStatusCode", 0))
            return str(told.get("Code", "")), status, str(told.get("Message", error))
    return "", 0, ""


def _without_answer(error: Exception, url: str, kind: type[OSError]) -> Failure:
    """Describe an error that occurred on this machine or on the way to the store.

    Args:
        kind: The exception class found so far; OSError when none is more exact.
    """
    names = {entry.__name__ for entry in type(error).__mro__}
    name, text = type(error).__name__, str(error)
    hopeless = kind is not OSError
    if (unknown := _unknown_host(error)) is not None:
        text, hopeless = f"{text}: {unknown.strerror}: correct AWS_ENDPOINT_URL", True
    elif "CERTIFICATE_VERIFY_FAILED" in text:
        text, hopeless = f"{text}: set AWS_CA_BUNDLE to the certificates to trust", True
    elif "BotoCoreError" in names:
        text = f"{text}: {_MENDS[name]}" if name in _MENDS else text
        hopeless = not names & _PASSING_KINDS
    elif isinstance(error, TimeoutError):
        text = f"timed out {text}"
    elif isinstance(error, OSError):
        hopeless = hopeless or error.errno in FULL
    else:
        text, hopeless = f"{name} {text}", isinstance(error, _MISTAKES)
    return Failure(_line(text or name, url), hopeless, kind)


def _unknown_host(error: BaseException | None) -> socket.gaierror | None:
    """Find the failed name lookup among an exception's causes.

    Return None when there is none, or when the lookup failed for a reason other than an unknown
    host.
    """
    for _ in range(10):
        if isinstance(error, socket.gaierror):
            return error if error.errno == socket.EAI_NONAME else None
        if error is None:
            return None
        error = error.__cause__ or error.__context__
    return None


def _line(text: str, url: str) -> str:
    """Return the text as one line, without the secrets of `url` and of the URLs in the text."""
    user, _, query = _split(url)
    for secret in filter(None, (user, query) if "://" in url else ()):
        text = text.replace(secret, "...")
    text = re.sub(r"[\w.+-]+://[^\s\"'<>]+", lambda found: redact(found[0]), text)
    return " ".join(text.split())[:LONGEST]
