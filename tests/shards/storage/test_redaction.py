"""URLs are shown without the secrets in them, however they are mistyped."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shards.errors import InputError
from shards.storage import files
from shards.storage.redaction import redact, user_info

CANARY = "c4n4ry"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://b/p", "s3://b/p"),
        ("s3://key:secret@b/p?X-Sig=1", "s3://b/p"),
        ("s3://key:sec/r/et@b/p", "s3://b/p"),
        ("s3://key:/secret@b/p", "s3://b/p"),
        ("s3://b/folder@home/p", "s3://b/folder@home/p"),
        ("http://host:9000/a@b/c?token=1", "http://host:9000/a@b/c"),
        ("https://user@host/p", "https://host/p"),
        ("s3://arn:aws:s3:eu:1:accesspoint/p/a@b", "s3://arn:aws:s3:eu:1:accesspoint/p/a@b"),
        ("/data/who@where?/x", "/data/who@where?/x"),
        ("s3://b/lr?[1]/a?b", "s3://b/lr?[1]/a?b"),
        ("https://h/lr?a/b", "https://h/lr"),
        ("s3://KEY%3Asecret%40b/p", "s3://b/p"),
        ("s3:///secret@b/p", "s3://b/p"),
        ("s3://key:se@cr/et@b/p", "s3://b/p"),
        ("https://key:se?cret@host/p", "https://host/p"),
        ("s3://b/p?X-Sig=a:b@c", "s3://b/p"),
        ("memory:///a@b/p", "memory:///a@b/p"),
        ("s3://key:9000/secret@b/p", "s3://b/p"),
        ("abfs://container@account/p", "abfs://container@account/p"),
        ("abfs://key:secret@account/p", "abfs://account/p"),
        ("file:///a:b@b/p", "file:///a:b@b/p"),
    ],
)
def test_redact(url: str, shown: str) -> None:
    assert redact(url) == shown
    signs = ("key:", "KEY%3A", "secret@", "@host")
    assert bool(user_info(url)) == any(sign in url for sign in signs)


@pytest.mark.parametrize("secret", ["c4n4ry", "c4/n4ry+c4n4ry=", "/c4n4ry:c4n4ry"])
@pytest.mark.parametrize(
    "typed",
    [
        *("s3://", "S3://", "s3:/", "s3:", "s3:///", "s3:////", "s3//", "s3;//", "s3.//", " s3:/"),
        *("s3:\\\\", "S3A:/", "gs:/", "https:/", "HTTPS//", "abfs:/", "az:"),
    ],
)
def test_a_mistyped_url_keeps_its_secrets(typed: str, secret: str) -> None:
    for url in (
        f"{typed}KEY:{secret}@bucket/run",
        f"{typed}KEY:{secret}@bucket/{{000..009}}.tar",
        f"{typed}bucket/run?X-Amz-Signature={secret}",
        f"{typed}KEY:{secret}@bucket/run?token={secret}",
    ):
        assert "c4n4ry" not in redact(url), url
        assert "bucket/" in redact(url)


@pytest.mark.parametrize(
    "path", ["s3/a:b/c", "s3.data/run", "gs", "az:x", "./s3:/k:p@b", "/s3:/k:p@b", "http.log?x"]
)
def test_paths_stay(path: str) -> None:
    assert redact(path) == path


# Forms that nobody has thought of ----------------------------------------------------------------

KNOWN = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "https", "http", "sftp", "hdfs", "wasbs")
MARKS = (
    *("://", ":/", ":", ":///", ":////", "//", "///", ";//", ".//", ",//", "-//", "=://", "::///"),
    *(":\\\\", " ://", ": //", ":/ /", "%3A//", "%3a/", "\uff1a//", ";/", "\\\\"),
)
WORD = st.text("abcXYZ019_-.", min_size=1, max_size=8)
# What stands in secret keys, and in passwords that people choose.
NOISE = st.text("aZ09+/=!:@$%&*~^?", max_size=6)


@st.composite
def capitals(draw: st.DrawFn, word: str) -> str:
    return "".join(c.upper() if draw(st.booleans()) else c for c in word)


@st.composite
def mistyped(draw: st.DrawFn) -> str:
    """A URL with the canary where a secret stands: a key, a password or a signature."""
    before = draw(st.sampled_from(["", " ", "\t"]))
    scheme = draw(st.sampled_from(KNOWN).flatmap(capitals)) + draw(st.sampled_from(MARKS))
    place = "/".join(draw(st.lists(WORD, min_size=1, max_size=3)))
    user = draw(WORD) + draw(st.sampled_from([":", "%3A"])) + draw(NOISE) + CANARY + draw(NOISE)
    query = f"?{draw(WORD).replace('.', '_')}={draw(NOISE)}{CANARY}"
    assume(not re.search(r":[\d]+/", user))  # a host and its port, of a URL with an @ in its path
    kind = draw(st.sampled_from(["user", "query", "both"]))
    return (
        f"{before}{scheme}{f'{user}@' if kind != 'query' else ''}{place}"
        f"{query if kind != 'user' else ''}"
    )


@given(mistyped())
def test_no_form_shows_a_secret(url: str) -> None:
    assert CANARY not in redact(url)


@settings(deadline=None)  # The first call imports what opens the URL.
@given(mistyped())
def test_no_message_shows_a_secret(url: str) -> None:
    told = ""
    try:
        files.check(url, "run")
        files.client(url)
    except InputError as error:
        told = str(error)
    assert CANARY not in told


@given(st.lists(st.text("ab:@?=.;,%[]* #\\", min_size=1, max_size=8), min_size=1, max_size=4))
def test_plain_paths_are_shown_as_they_are(names: list[str]) -> None:
    for path in ("/" + "/".join(names), "./" + "/".join(names), "data/" + "/".join(names)):
        assert redact(path) == path
