"""Create objects that do not exist yet, so that of many callers one succeeds, on any storage."""

import contextlib
import os
import time

from shards.errors import InputError
from shards.storage import files, local_files
from shards.storage.failures import is_refused_condition
from shards.storage.retries import retry

EXCLUSIVE = "BYOL_EXCLUSIVE_CREATE"  # A variable for stores without exclusive create.
SETTLE = 1.0  # Seconds after which a store without it is asked whose object is there.


def create(url: str, content: bytes) -> bool:
    """Write an object that does not exist yet. Return False, and write nothing, if it exists.

    When several callers try at once, one succeeds. Every caller's `content` must be different:
    when an answer gets lost, the content shows whether this call wrote the object. Where
    `is_exclusive` is False, the last of them succeeds, if they are less than SETTLE seconds apart.

    Raises OSError when a store refuses or ignores the condition, which is noticed by a second try.
    """
    filesystem, path = files.client(url)
    if not files.is_local(url) and not is_exclusive():
        return _create_and_look(url, content)

    def put() -> bool:
        if files.is_local(url):
            local_files.create(path, content)
            return True
        try:
            filesystem.pipe_file(path, content, mode="create")
        except Exception as error:
            if is_refused_condition(error):
                return False
            raise
        return True

    try:
        taken = retry(url, put)
    except FileExistsError:
        return files.read(url) == content
    if files.is_local(url):
        return True
    if taken:
        try:
            retry(url, put)
        except FileExistsError:
            return True
        with contextlib.suppress(OSError):  # The user must see the error below.
            files.remove(url)
    raise OSError(
        f"{files.redact(url)}: the store {'ignores' if taken else 'refuses'} exclusive create "
        f"(If-None-Match): take one that honors it, or set {EXCLUSIVE}=no, and never start two "
        "jobs for one run at the same moment"
    )


def _create_and_look(url: str, content: bytes) -> bool:
    if files.exists(url):
        return False
    files.write(url, content)
    time.sleep(SETTLE)
    return files.read(url) == content


def is_exclusive() -> bool:
    """Return whether `create` relies on the store's exclusive create.

    Raises InputError when the variable EXCLUSIVE says neither yes nor no.
    """
    value = os.environ.get(EXCLUSIVE, "yes")
    if value not in ("yes", "no"):
        raise InputError(f"{EXCLUSIVE} must be yes or no, not {value!r}")
    return value == "yes"
