"""Turn an exception of a storage library into one line for users, and say whether to retry."""

import errno
import re
import socket
from typing import Any, NamedTuple

from shards.storage import space
from shards.storage.redaction import redact, split

LONGEST = 400  # A reason is cut to this many characters.

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_REGION = "the bucket is in another region: set AWS_DEFAULT_REGION"
_CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
_ACCEPTED = f"the credentials are not accepted: {_CREDENTIALS}"
_LOGIN = "log in again, as with `aws sso login`"
_MENDS = {  # The keys are error codes of S3 answers and names of botocore exceptions.
    "NoSuchBucket": "create the bucket, or correct the URL",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "InvalidAccessKeyId": _ACCEPTED,
    "SignatureDoesNotMatch": _ACCEPTED,
    "XAmzContentSHA256Mismatch": f"if it stays, set {_CHECKSUMS}",
    "NoCredentialsError": f"{_CREDENTIALS}, or FSSPEC_S3_ANON=true for a public bucket",
    "PartialCredentialsError": _CREDENTIALS,
    "ProfileNotFound": "correct AWS_PROFILE",
    **dict.fromkeys(
        ("ReadTimeoutError", "ConnectTimeoutError"), "the store does not answer: is it overloaded?"
    ),
    "EndpointConnectionError": "is AWS_ENDPOINT_URL right, and does a server answer there?",
    "SSOTokenLoadError": _LOGIN,
    "UnauthorizedSSOTokenError": _LOGIN,
    "TokenRetrievalError": _LOGIN,
}
_PERMISSIONS = {  # by botocore's name of the request
    # Where listing is not allowed, AWS answers so for objects that are not there, too.
    **dict.fromkeys(("GetObject", "HeadObject"), "s3:GetObject (or s3:ListBucket)"),
    **dict.fromkeys(("ListObjectsV2", "HeadBucket"), "s3:ListBucket"),
    "DeleteObject": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    **dict.fromkeys(
        ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"),
        "s3:PutObject",
    ),
}
EXPIRED = {  # error codes of credentials that were good
    *("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"),
}
_SKEWED = {"RequestTimeTooSkewed", "RequestInTheFuture", "InvalidSignatureTime"}
_RENEW = (
    "the credentials have expired: renew them; those of a profile or a role are read again "
    "at the next try, and those in AWS_ variables only at the next start"
)
_PAGE = (
    "no store answers there, but a web page, as of a proxy or of a network's login: is "
    "AWS_ENDPOINT_URL right, and is NO_PROXY set where it has to be?"
)
_NO_TLS = "the server there speaks plain HTTP: begin AWS_ENDPOINT_URL with http://, not https://"
_NO_ENDPOINT = "the endpoint_url that is set is no URL: it has to begin with http:// or https://"
_NO_CHECKSUMS = f"this store does not know the checksums in requests: set {_CHECKSUMS}"
_WITH_CHECKSUMS = ("PutObject", "UploadPart")  # requests whose body goes with a checksum
_FULL = "the store is full or its quota is used up: remove something there, or get more space"

# How stores tell that they lack the checksums of requests or conditional ones, and that they are
# full. Their codes and their HTTP statuses differ.
_ABOUT_CHECKSUMS = re.compile(
    r"x-amz-(sdk-)?checksum|x-amz-trailer|aws-chunked|streaming-(unsigned|aws4)", re.IGNORECASE
)
_ABOUT_NO_TLS = re.compile(r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|HTTP_REQUEST")
_ABOUT_CONDITIONS = re.compile(r"if-?none-?match|condition", re.IGNORECASE)
_ABOUT_SPACE = re.compile(
    r"quota|storage ?(is )?full|insufficient ?storage|(storage|transaction) cap|no space|"
    r"minimum free drive",
    re.IGNORECASE,
)

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
_NO_NAME = {errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ}  # With these, the path is at fault.
_FINAL = (
    *(FileNotFoundError, FileExistsError, PermissionError),
    *(IsADirectoryError, NotADirectoryError),
)


class Failure(NamedTuple):
    """The reason why a call to a storage library failed."""

    reason: str  # one line, without the secrets of any URL
    hopeless: bool  # True when the same call would fail again
    kind: type[OSError]  # the exception class that the caller raises
    brief: bool = False  # True when a few tries tell whether it passes


class NoStore(OSError):
    """An answer came that is not a store's."""


def explain(error: Exception, url: str) -> Failure:
    """Describe an exception that a storage library raised for `url`."""
    kind = next((kind for kind in _FINAL if isinstance(error, kind)), OSError)
    answer = _answer(error)
    if answer is None:
        return _without_answer(error, url, kind)
    code, status, message, request, page = answer
    text = f"{message.rstrip('.')} ({code})"
    passing = status >= 500 or code in _PASSING or status in _PASSING_STATUSES
    brief = False
    if page:
        text, kind, brief = f"{_PAGE} (HTTP status {status})", OSError, status < 500
    elif code in EXPIRED:
        text, kind, brief = f"{_RENEW}: {text}", PermissionError, True
    elif code in _SKEWED:
        text, kind = f"this machine's clock is wrong: set it: {text}", PermissionError
    elif status == 507 or (status not in (429, 503) and _ABOUT_SPACE.search(text)):
        text, kind, brief = f"{_FULL}: {text}", OSError, True
    elif status in (400, 403, 501) and _ABOUT_CHECKSUMS.search(text):
        text, kind = f"{_NO_CHECKSUMS}: {text}", OSError
    elif status in (401, 403):
        text, kind = f"access denied: {text}: {_permit(code, request)}", PermissionError
    elif status == 412:
        # An exclusive create found an object. s3fs recognizes this only in AWS's own wording.
        kind = FileExistsError
    elif code in _MENDS:  # A missing bucket must not look like a missing file.
        text, kind = f"{text}: {_MENDS[code]}", OSError
    elif status == 501:
        text = f"this store lacks something that {request or 'the request'} needs: {text}"
        if request in _WITH_CHECKSUMS:
            text += f"; if it is checksums, set {_CHECKSUMS}"
    hopeless = status == 501 or not (passing or brief)
    return Failure(_line(text, url), hopeless, kind, brief)


def _permit(code: str, request: str) -> str:
    """Return what mends a refused access."""
    if code == "SignatureDoesNotMatch" and request in _WITH_CHECKSUMS:
        return f"{_MENDS[code]}; if reading works, set {_CHECKSUMS}"  # as with Google's S3 door
    if code in _MENDS:
        return _MENDS[code]
    if permission := _PERMISSIONS.get(request):
        return f"these credentials may lack {permission}: grant it, or {_CREDENTIALS}"
    return f"the credentials are not accepted or do not allow this: {_CREDENTIALS}"


def is_beyond_end(error: Exception) -> bool:
    """Return whether S3 refused a range because the object ends before it."""
    return http_status(error) == 416


def http_status(error: Exception) -> int:
    """Return the HTTP status of S3's answer, or 0 when S3 gave no answer."""
    answer = _answer(error)
    return answer.status if answer else 0


def is_refused_listing(error: Exception) -> bool:
    """Return whether S3 did not allow a folder to be listed."""
    answer = _answer(error)
    return answer is not None and answer.status == 403 and answer.request == "ListObjectsV2"


def is_refused_condition(error: Exception) -> bool:
    """Return whether S3 did not understand the condition of an exclusive create."""
    answer = _answer(error)
    if answer is None or _ABOUT_CHECKSUMS.search(answer.message):
        return False
    return answer.status == 501 or (
        answer.status == 400 and _ABOUT_CONDITIONS.search(answer.message) is not None
    )


def is_page(headers: dict[str, str]) -> bool:
    """Return whether an answer with these HTTP headers is a web page."""
    return headers.get("content-type", "").lower().startswith("text/html")


class _Answer(NamedTuple):
    """What S3, or something in its place, answered to a request that failed."""

    code: str
    status: int
    message: str
    request: str  # botocore's name of it
    page: bool  # whether the answer is a web page


def _answer(error: Exception) -> _Answer | None:
    """Return S3's answer, or None when S3 gave none."""
    for candidate in (error, error.__cause__):
        response: Any = getattr(candidate, "response", None)
        if isinstance(response, dict) and "Error" in response:
            told, head = response["Error"], response.get("ResponseMetadata", {})
            if status := int(head.get("HTTPStatusCode", 0)):
                return _Answer(
                    str(told.get("Code", "")),
                    status,
                    str(told.get("Message", error)),
                    str(getattr(candidate, "operation_name", "")),
                    is_page(head.get("HTTPHeaders", {})),
                )
    return None


def _without_answer(error: Exception, url: str, kind: type[OSError]) -> Failure:
    """Describe an error that occurred on this machine or on the way to the store.

    Args:
        kind: The exception class found so far; OSError when none is more exact.
    """
    names = {entry.__name__ for entry in type(error).__mro__}
    name, text = type(error).__name__, str(error)
    hopeless, brief = kind is not OSError, False
    if isinstance(error, NoStore) or "ResponseParserError" in names:
        text, brief = f"{_PAGE} ({text[:80]})", True
    elif (unknown := _unknown_host(error)) is not None:
        text, hopeless = f"{text}: {unknown.strerror}: correct AWS_ENDPOINT_URL", True
    elif _ABOUT_NO_TLS.search(text):
        text, hopeless = f"{_NO_TLS} ({text})", True
    elif text.startswith("Invalid endpoint"):  # it may hold a password
        text, hopeless = _NO_ENDPOINT, True
    elif "CERTIFICATE_VERIFY_FAILED" in text:
        text, hopeless = f"{text}: set AWS_CA_BUNDLE to the certificates to trust", True
    elif "BotoCoreError" in names:
        text = f"{text}: {_MENDS[name]}" if name in _MENDS else text
        hopeless = not names & _PASSING_KINDS
    elif isinstance(error, TimeoutError):
        text = f"timed out {text}"
    elif isinstance(error, OSError):
        hopeless = hopeless or error.errno in FULL | _NO_NAME
    else:
        text, hopeless = f"{name} {text}", isinstance(error, _MISTAKES)
    return Failure(_line(text or name, url), hopeless, kind, brief)


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
    user, _, query = split(url)
    for secret in filter(None, (user, query) if "://" in url else ()):
        text = text.replace(secret, "...")
    text = re.sub(r"[\w.+-]+://[^\s\"'<>]+", lambda found: redact(found[0]), text)
    return " ".join(text.split())[:LONGEST]
