"""Commands that are shown can be copied: quoted, without credentials, right where one stands."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shards.storage.commands import quote, spell_program
from shards.storage.local_files import absolute
from tests.helpers.places import ROOT


def test_words_are_quoted() -> None:
    assert quote("runs/a b's") == "'runs/a b'\"'\"'s'"
    assert quote("s3://bucket/runs") == "s3://bucket/runs"
    assert "secret" not in quote("https://user:secret@host/a")


def test_programs_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shown = spell_program("pack.py", "--index-only", "s3://b/a b")
    assert shown == "python launch/pack.py --index-only 's3://b/a b'"
    anywhere = spell_program("pack.py", "a b", anywhere=True)
    assert shlex.split(anywhere) == ["python", f"{ROOT}/launch/pack.py", "a b"]
    monkeypatch.chdir(tmp_path)
    python, *words = shlex.split(spell_program("pack.py", "--help"))
    assert python == "python"
    done = subprocess.run([sys.executable, *words], capture_output=True, check=True, cwd=tmp_path)
    assert b"Pack images into shards" in done.stdout


def test_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for url, expected in (
        ("", ""),
        ("a b/c", f"{tmp_path}/a b/c"),
        ("./a//b/", f"{tmp_path}/a/b"),
        ("/a/b", "/a/b"),
        ("~/a", "/home/me/a"),
        ("s3://b/../a", "s3://b/../a"),
        ("file:///a", "file:///a"),
    ):
        assert absolute(url) == expected
    assert Path(absolute("link/../x")).parent.resolve() == tmp_path / "deep"
