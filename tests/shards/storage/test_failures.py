"""Errors of a storage library: one line without secrets, and whether to try again."""

import errno
import socket

import pytest
from aiohttp import ClientConnectorDNSError, ClientPayloadError
from aiohttp.client_reqrep import ConnectionKey
from botocore import exceptions as boto  # type: ignore[import-untyped]
from s3fs.errors import translate_boto_error  # type: ignore[import-untyped]

from shards.storage.failures import Failure, explain, is_beyond_end

URL = "s3://bucket/folder/shard.tar"


def answered(code: str, status: int, message: str = "as the store says") -> Failure:
    """What is told when S3 answers so, through the library's own translation."""
    response = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return explain(translate_boto_error(boto.ClientError(response, "GetObject")), URL)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        *[("SlowDown", 503), ("InternalError", 500), ("503", 503), ("Unheard", 599)],
        *[("RequestTimeout", 400), ("BadDigest", 400), ("ThrottlingException", 400)],
        *[("OperationAborted", 409), ("TooManyRequests", 429)],
    ],
)
def test_answers_that_pass(code: str, status: int) -> None:
    failure = answered(code, status)
    assert not failure.hopeless
    assert "as the store says" in failure.reason
    assert code in failure.reason


@pytest.mark.parametrize(
    ("code", "status", "kind", "mend"),
    [
        ("NoSuchKey", 404, FileNotFoundError, ""),
        ("404", 404, FileNotFoundError, ""),
        ("NoSuchBucket", 404, OSError, "create the bucket"),
        ("AccessDenied", 403, PermissionError, "AWS_PROFILE"),
        ("403", 403, PermissionError, "AWS_PROFILE"),
        ("NewKindOfDenial", 403, PermissionError, "AWS_PROFILE"),
        ("RequestTimeTooSkewed", 403, PermissionError, "clock"),
        ("PermanentRedirect", 301, OSError, "AWS_DEFAULT_REGION"),
        ("InvalidBucketName", 400, OSError, ""),
        ("NotImplemented", 501, OSError, ""),
    ],
)
def test_answers_that_stay(code: str, status: int, kind: type[OSError], mend: str) -> None:
    failure = answered(code, status)
    assert failure.hopeless
    assert failure.kind is kind
    assert mend in failure.reason


def test_only_a_range_can_lie_beyond_the_end() -> None:
    response = {"Error": {"Code": "InvalidRange"}, "ResponseMetadata": {"HTTPStatusCode": 416}}
    error = boto.ClientError(response, "GetObject")
    assert is_beyond_end(translate_boto_error(error))
    assert not is_beyond_end(FileNotFoundError())


def connecting(cause: Exception) -> Exception:
    """As aiobotocore raises it when it has caught `cause`."""
    error: Exception = boto.EndpointConnectionError(endpoint_url="http://h/b?a=1", error=cause)
    error.__context__ = cause
    return error


def unknown_host(code: int) -> Exception:
    key = ConnectionKey("h", 80, False, True, None, None, None)
    found = socket.gaierror(code, "not known")
    error = ClientConnectorDNSError(key, found)
    error.__cause__ = found
    return connecting(error)


@pytest.mark.parametrize(
    ("error", "hopeless", "text"),
    [
        (boto.NoCredentialsError(), True, "set AWS_ACCESS_KEY_ID"),
        (boto.ProfileNotFound(profile="p"), True, "correct AWS_PROFILE"),
        (boto.ParamValidationError(report="a\nb"), True, "failed: a b"),
        (boto.CredentialRetrievalError(provider="p", error_msg="m"), False, "p: m"),
        (boto.ReadTimeoutError(endpoint_url="http://h/b?a=1", error=""), False, '"http://h/b"'),
        (boto.ConnectTimeoutError(endpoint_url="http://h", error=""), False, "does not answer"),
        (boto.HTTPClientError(error="broke"), False, "broke"),
        (connecting(ConnectionRefusedError(111, "no")), False, "is AWS_ENDPOINT_URL right"),
        (unknown_host(socket.EAI_NONAME), True, "not known: correct AWS_ENDPOINT_URL"),
        (unknown_host(socket.EAI_AGAIN), False, "is AWS_ENDPOINT_URL right"),
        (boto.SSLError(endpoint_url="h", error="CERTIFICATE_VERIFY_FAILED"), True, "AWS_CA_BUNDLE"),
        (
            boto.SSLError(endpoint_url="h", error="[SSL: WRONG_VERSION_NUMBER]"),
            True,
            "http://, not",
        ),
        (ValueError("Invalid endpoint: 127.0.0.1:1"), True, "begin with http:// or https://"),
        (boto.SSLError(endpoint_url="h", error="EOF"), False, "EOF"),
        (ClientPayloadError("cut"), False, "ClientPayloadError cut"),
        (TimeoutError(), False, "timed out"),
        (ConnectionResetError(104, "reset"), False, "reset"),
        (OSError(errno.ENOSPC, "full"), True, "full"),
        (ValueError("bad port"), True, "ValueError bad port"),
        (RuntimeError(), False, "RuntimeError"),
    ],
)
def test_without_an_answer(error: Exception, hopeless: bool, text: str) -> None:
    failure = explain(error, URL)
    assert failure.hopeless is hopeless
    assert text in failure.reason
    assert "\n" not in failure.reason


def test_a_reason_holds_no_secret() -> None:
    url = "ftp://user:pa55word@host/file?token=t0ken"
    text = f'could not\nopen "{url}", nor http://k:pa66@h/x?y=z, for user:pa55word; token=t0ken'
    reason = explain(OSError(text), url).reason
    for secret in ("pa55", "pa66", "t0ken", "y=z", "\n"):
        assert secret not in reason
    assert "ftp://host/file" in reason
