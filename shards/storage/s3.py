"""Open s3:// URLs with an s3fs that leaves the retrying to this package and looks at every answer.

It notices answers that no store gave, such as the login page of a network, which s3fs would take
for objects and for successes. It opens a new session when credentials have expired, so that a retry
finds those that a role, a profile or another program has renewed.
"""

import functools
import os
import re
from typing import Any

import fsspec

from shards.errors import InputError
from shards.storage.failures import (
    EXPIRED,
    NoStore,
    http_status,
    is_beyond_end,
    is_page,
)
from shards.storage.redaction import redact, user_info

CONNECTIONS = 64  # All threads of a process share this many connections to a store.

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # The first one that is set counts.
_SILENT = {400, 403, 405, 501}  # A HEAD that is refused with one of these may hide a reason.

# An answer of S3 has one of these fields. Nothing is stored or read by other requests.
_OBJECT = {"ETag"}
_FIELDS = {
    **dict.fromkeys(("GetObject", "HeadObject", "PutObject", "UploadPart"), _OBJECT),
    "CreateMultipartUpload": {"UploadId"},
    "ListObjectsV2": {"Name", "KeyCount", "MaxKeys", "IsTruncated", "Contents", "CommonPrefixes"},
}


def is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def open_s3(url: str) -> tuple[Any, str]:
    """Return an s3fs filesystem, with its own retries turned off, and the path of `url` inside it.

    botocore sends a request five times, and s3fs repeats that five times, and twice as often for
    reads. Together with this package's `retry`, a dead server would be reported only after an hour.
    Raises InputError for a URL that holds credentials or no valid name, and for an endpoint that
    holds credentials or is no URL.
    """
    if user_info(url):
        raise InputError(
            f"{redact(url)}: credentials are not read from a URL: take them out and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if "?versionId=" in url or "\0" in url or not _is_unicode(url):
        place = ascii(redact(url))[1:-1]
        raise InputError(f"{place}: no name on S3, where names are UTF-8 without ?versionId=")
    _check_endpoint()
    once = {"mode": "standard", "total_max_attempts": 1}
    try:
        kind = _filesystem_class()
        given = fsspec.config.apply_config(kind, {}).get("config_kwargs", {})
        config = {"max_pool_connections": CONNECTIONS, "retries": once} | given
        # A cached listing would hide what another process writes later.
        filesystem = kind(use_listings_cache=False, config_kwargs=config)
    except (ImportError, ValueError, TypeError, OSError) as error:
        raise InputError(f"{redact(url)}: no storage for this URL: {error}") from None
    filesystem.retries = 1
    filesystem.max_concurrency = 1  # Otherwise every read of a whole object begins with a HEAD.
    return filesystem, kind._strip_protocol(url)


def _check_endpoint() -> None:
    """Raise InputError, without the value, for a variable of the endpoint that cannot be used."""
    if os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return
    name = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if name is None:
        return
    found = re.match(r"https?://[^/?#]", os.environ[name], re.IGNORECASE)
    if "@" in os.environ[name]:
        raise InputError(
            f"{name} holds credentials, which are not read from there: take out what stands "
            "before the @ and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not found:
        raise InputError(
            f"{name} is no URL: it has to begin with http:// or https://, as in {name}="
            "https://HOST:PORT"
        )


def _is_unicode(url: str) -> bool:
    try:
        url.encode()
    except UnicodeEncodeError:  # Names of local files need not be UTF-8.
        return False
    return True


@functools.cache
def _filesystem_class() -> Any:
    """Define the filesystem when it is first needed, because s3fs takes long to import."""
    base = fsspec.get_filesystem_class("s3")

    class Filesystem(base):  # type: ignore[misc, valid-type]
        """An s3fs that looks at every answer."""

        _expired = False

        async def set_session(self, refresh: bool = False, **_: Any) -> Any:
            refresh, self._expired = refresh or self._expired, False
            return await super().set_session(refresh)

        async def get_s3(self, bucket: str | None = None) -> Any:
            client = await super().get_s3(bucket)
            client.meta.events.register("after-call.s3", self._look, unique_id="byol-look")
            return client

        def _look(self, model: Any, parsed: dict[str, Any], **_: Any) -> None:
            """Look at an answer. Raises NoStore when it is none of a store."""
            check_answer(model.name, parsed)
            if parsed.get("Error", {}).get("Code") in EXPIRED:
                self._expired = True

        async def _call_s3(self, method: str, *options: Any, **fields: Any) -> Any:
            try:
                return await super()._call_s3(method, *options, **fields)
            except OSError as error:
                if method != "head_object" or http_status(error) not in _SILENT:
                    raise
            # The answer to a HEAD has no body, so it gives no reason, and some stores allow GETs
            # alone. This fails with the reason, or gives the same answer.
            fields["Range"] = "bytes=0-0"
            try:
                answer = await super()._call_s3("get_object", *options, **fields)
            except OSError as error:
                if not is_beyond_end(error):
                    raise
                return {"ContentLength": 0}
            answer.pop("Body").close()
            length = answer.get("ContentRange", "").rpartition("/")[2]
            return answer | ({"ContentLength": int(length)} if length.isdigit() else {})

    # fsspec keeps one cache for each class, and who empties that of s3fs means this one too.
    Filesystem._cache = base._cache
    return Filesystem


def check_answer(operation: str, answer: dict[str, Any]) -> None:
    """Raise NoStore when an answer that says that all went well cannot be a store's.

    A store names its requests in fields that begin with `x-amz-`, or tells what S3 requires.
    """
    told = answer.get("ResponseMetadata", {})
    heads = told.get("HTTPHeaders", {})
    if told.get("HTTPStatusCode", 0) >= 300 or any(name.startswith("x-amz-") for name in heads):
        return
    status = told.get("HTTPStatusCode", 0)
    # Pages do not come in ranges.
    lacking = operation in _FIELDS and not _FIELDS[operation] & answer.keys() and status != 206
    if lacking or is_page(heads):
        raise NoStore(f"HTTP status {status}")
