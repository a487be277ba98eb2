"""URLs that a slip made another, and documents that are none."""

import re
from pathlib import Path

import pytest

from shards.errors import InputError
from shards.storage import files


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3://", "names no bucket or folder"),
        ("file:///", "names no bucket or folder"),
        ("s3:/try/run", "a URL has two slashes: s3://..."),
        ("s3:/KEY:c4n4ry@try/run", "a URL has two slashes: s3://..."),
        ("s3//KEY:c4n4ry@try/run", "s3//try/run: a URL has two slashes: s3://..."),
        ("HTTPS;//host/run", "a URL has two slashes: https://..."),
        ("S3://KEY:c4n4ry@try/run", "S3://try/run: a URL begins with small letters: s3://..."),
        (" s3://try/run", "a URL begins with small letters: s3://..."),
        ("s3://try/run?X-Amz-Signature=c4n4ry", "an s3 URL has no query"),
        ("s3://try/a?b/run?X-Amz-Signature=c4n4ry", "an s3 URL has no query"),
        ("runs/a\0b", "holds NUL or half a character"),
        ("s3://KEY:c4n4ry@try/a\0b", "holds NUL or half a character"),
        ("runs/\ud800", "holds NUL or half a character"),
        ("s3://try/\udcff", "holds NUL or half a character"),
    ],
)
def test_slips_in_urls_are_told(url: str, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)) as error:
        files.check(url, "run")
    assert str(error.value).startswith("run ")
    assert "c4n4ry" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        *("", "run", "/run", "a:b/c", "s3://try", "memory://a?b", "file:///a"),
        *("runs/\udcff", "s3://try/ü日"),  # Bytes of a path need not be UTF-8.
        *("s3/run", "a//b", "https/run", "./s3:/run", "/s3:/run"),
        *("s3://try/lr?", "s3://try/a?b/[1]*#%41 ::c", "s3://try/what? that=this"),
    ],
)
def test_other_urls_are_left_alone(url: str) -> None:
    files.check(url, "run")


def test_json_that_is_nested_too_deeply_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested"):
        files.read_json(f"{tmp_path}/a.json")
