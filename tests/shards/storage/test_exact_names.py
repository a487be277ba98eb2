"""A path is a name, never a pattern: only what was named is read, replaced or removed.

Names are made of what globs, queries, fragments, escapes and chains of file systems are made of.
Beside each lie those that such a reading would hit. What lies there is listed without the code
under test: by os.walk, by requests to S3, from the memory itself.
"""

import hashlib
import os
import re
import secrets
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.state import checkpoint
from launch import evaluate, export
from launch import pack as pack_command
from shards.errors import InputError
from shards.loader import DataConfig
from shards.making import pack
from shards.storage import exclusive, files, upload
from tests.conftest import PackFiles, draw_photo
from tests.helpers import tiny
from tests.helpers.object_store import ObjectStore
from tests.helpers.training import train

Contents = dict[str, bytes]

_PIECES = ["[", "]", "*", "?", "#", "%", "::", " ", "\n", "😀", "a", "b", "1", "+", "{a,b}"]
_PATTERNS = ["[1]", "[!b]", "[a-b]", "**", "%41", "%2F", "?x", "?x=1", "file::", "~", "$a"]
_NAMES = st.lists(st.sampled_from(_PIECES + _PATTERNS), min_size=1, max_size=4).map("".join)
_BYTES = st.binary(min_size=1, max_size=4).filter(lambda name: not set(name) & {0, ord("/")})
_LOCAL_NAMES = st.one_of(_NAMES, _BYTES.map(os.fsdecode)).filter(lambda n: n not in (".", ".."))

few = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def neighbors(name: str) -> set[str]:
    """Other names that a pattern, a query, a chain, a decoding or a prefix of it would hit."""
    found = {
        re.sub(r"\[!?(.)[^\]]*\]", r"\1", name),
        re.sub(r"\[[^\]]*\]", "1", name),
        re.sub(r"\*+", "", name),
        re.sub(r"\*+", "x", name),
        name.replace("?", "x"),
        name.replace("{a,b}", "a"),
        name.replace("+", " "),
        name.replace("\n", ""),
        re.split(r"\?|#", name)[0],
        name.partition("::")[0],
        name.rpartition("::")[2],
        urllib.parse.unquote(name, errors="surrogateescape"),
        urllib.parse.quote(name, errors="surrogateescape"),
        name.strip(),
        name[:-1],
        f"{name}x",
        f"{name} ",
    }
    return {n for n in found if n and "/" not in n and n not in (name, ".", "..")}


class Place:
    """A new folder in a store, and what is in it."""

    def __init__(self, root: str, object_store: ObjectStore | None = None) -> None:
        self.url = f"{root}/{secrets.token_hex(6)}"
        self.path = self.url.partition("://")[2] or self.url
        self._s3: Any = object_store and object_store.filesystem(use_listings_cache=False)
        self._memory: Any = fsspec.filesystem("memory")

    def put(self, contents: Contents) -> None:
        for name, content in contents.items():
            if self._s3:
                bucket, key = f"{self.path}/{name}".split("/", 1)
                self._s3.call_s3("put_object", Bucket=bucket, Key=key, Body=content)
            elif self.url.startswith("memory://"):
                self._memory.pipe_file(f"/{self.path}/{name}", content)
            else:
                path = f"{self.path}/{name}"
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(content)

    def seen(self) -> dict[str, str]:
        """The MD5 of everything there, which S3 tells with its names."""
        if self._s3:
            bucket, folder = self.path.split("/", 1)
            listed = self._s3.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{folder}/")
            assert not listed["IsTruncated"]
            entries = listed.get("Contents", [])
            return {e["Key"][len(folder) + 1 :]: e["ETag"].strip('"') for e in entries}
        if self.url.startswith("memory://"):
            files = {path.lstrip("/"): file for path, file in self._memory.store.items()}
            below = [path for path in files if path.startswith(f"{self.path}/")]
            return {path[len(self.path) + 1 :]: md5(files[path].getvalue()) for path in below}
        paths = [f"{folder}/{n}" for folder, _, names in os.walk(self.path) for n in names]
        return {path[len(self.path) + 1 :]: md5(content_of(path)) for path in paths}


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def sums(contents: Contents) -> dict[str, str]:
    return {name: md5(content) for name, content in contents.items()}


def content_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _write(url: str, content: bytes) -> None:
    files.write(url, content)


def _create(url: str, content: bytes) -> None:
    assert exclusive.create(url, content)
    assert not exclusive.create(url, b"another's")


def _stream(url: str, content: bytes) -> None:
    with upload.open_writer(url) as file:
        file.write(content)


def check_object(place: Place, name: str, copy: str) -> None:
    """All that is done to one object, beside its neighbors."""
    beside = {other: f"of {i}".encode() for i, other in enumerate(sorted(neighbors(name)))}
    place.put(beside)
    url = files.join(place.url, name)
    check_absent(place, url)
    for make in (_write, _create, _stream):
        content = secrets.token_bytes(9)
        make(url, content)
        assert place.seen() == sums(beside | {name: content})
        assert files.read(url) == content
        assert files.read(url, 2, 5) == content[2:5]
        assert files.exists(url)
        assert files.size(url) == 9
        with files.open_reader(url) as file:
            assert file.read() == content
        files.download(url, 9, copy)
        assert content_of(copy) == content
        assert files.list_names(place.url) == sorted([name, *beside])
        sizes = {other: len(body) for other, body in beside.items()} | {name: len(content)}
        assert dict(files.walk(place.url)) == sizes
        files.remove(url)
        assert place.seen() == sums(beside)
    check_absent(place, url)


def check_absent(place: Place, url: str) -> None:
    before = place.seen()
    assert not files.exists(url)
    assert files.list_names(url) == []
    assert list(files.walk(url)) == []
    for look in (files.read, files.size, files.open_reader):
        with pytest.raises(FileNotFoundError):
            look(url)
    files.remove(url)
    assert place.seen() == before


def check_folder(place: Place, name: str) -> None:
    """All that is done to a folder, beside its neighbors."""
    inside = {"x": b"1", f"in/{name}": b"22", f"{name}y": b"333"}
    beside = {f"{other}/{inner}": b"of another" for other in neighbors(name) for inner in inside}
    place.put(beside)
    url = files.join(place.url, name)
    check_absent(place, url)
    place.put({f"{name}/{inner}": content for inner, content in inside.items()})
    assert files.exists(url)
    assert files.list_names(url) == sorted(["x", "in", f"{name}y"])
    assert dict(files.walk(url)) == {inner: len(content) for inner, content in inside.items()}
    assert files.list_names(place.url) == sorted([name, *neighbors(name)])
    files.remove(url)
    assert place.seen() == sums(beside)


def of_all(names: st.SearchStrategy[str]) -> Callable[..., Callable[..., None]]:
    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for name in ("a[1]", "a*b", "a?b#c%41", "a::b", " a\nb", "a"):
            test = example(name=name)(test)
        return few(given(name=names)(test))

    return decorate


@of_all(_LOCAL_NAMES)
@example(name=os.fsdecode(b"a\xff"))
def test_a_local_file_is_what_was_named(tmp_path: Path, name: str) -> None:
    check_object(Place(str(tmp_path)), name, f"{tmp_path}/copy")


@of_all(_LOCAL_NAMES)
@example(name=os.fsdecode(b"a\xff"))
def test_a_local_folder_is_what_was_named(tmp_path: Path, name: str) -> None:
    check_folder(Place(f"file://{tmp_path}"), name)


@of_all(_NAMES)
def test_an_object_in_memory_is_what_was_named(tmp_path: Path, name: str) -> None:
    check_object(Place("memory://names"), name, f"{tmp_path}/copy")


@of_all(_NAMES)
def test_a_folder_in_memory_is_what_was_named(name: str) -> None:
    check_folder(Place("memory://names"), name)


@of_all(_NAMES)
def test_an_object_on_s3_is_what_was_named(
    s3: str, object_store: ObjectStore, tmp_path: Path, name: str
) -> None:
    check_object(Place(s3, object_store), name, f"{tmp_path}/copy")


@of_all(_NAMES)
def test_a_folder_on_s3_is_what_was_named(s3: str, object_store: ObjectStore, name: str) -> None:
    check_folder(Place(s3, object_store), name)


def test_markers_of_folders_go_with_them(s3: str, object_store: ObjectStore) -> None:
    place = Place(s3, object_store)
    place.put({"a/": b"", "a/b/": b"", "a/x": b"1", "ab/": b"", "ab/x": b"2"})
    files.remove(files.join(place.url, "a"))
    assert place.seen() == sums({"ab/": b"", "ab/x": b"2"})


def test_a_link_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_bytes(b"1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "inner").symlink_to(tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("link", "broken", "run"):
        files.remove(f"{tmp_path}/{name}")
    assert sorted(os.listdir(tmp_path)) == ["kept"]
    assert content_of(f"{tmp_path}/kept/x") == b"1"


@pytest.mark.parametrize(
    "url",
    [
        "simplecache::s3://bucket/a",
        "reference::file:///tmp/a",
        "filecache::memory://a",
        "zip://a::s3://bucket/b.zip",
        "nothing://a",
    ],
)
@pytest.mark.parametrize("use", [files.read, files.exists, files.list_names, files.remove])
def test_chains_of_file_systems_are_no_urls(url: str, use: Callable[[str], object]) -> None:
    with pytest.raises(InputError, match="no storage for this URL") as error:
        use(url)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a\udcff", "a?versionId=x", "a\0"])
@pytest.mark.parametrize("use", [files.read, files.exists, files.list_names, files.remove])
def test_what_s3_cannot_name_is_told_in_a_line(
    s3: str, name: str, use: Callable[[str], object]
) -> None:
    with pytest.raises(InputError, match="no name on S3") as error:
        use(f"{s3}/{name}")
    assert re.fullmatch("[ -~]+", str(error.value))  # which can be printed anywhere


# The whole way


def test_pruning_leaves_the_runs_alone_that_a_pattern_would_hit(
    s3: str, object_store: ObjectStore
) -> None:
    place = Place(s3, object_store)
    steps = [f"checkpoints/step_{step:08d}" for step in (2, 4, 6)]
    state = {f"{step}/{name}": b"1" for step in steps for name in ("commit.json", "__0_0.distcp")}
    runs = ("lr[1]", "lr1", "lr*", "lrx")
    place.put({f"{run}/{file}": content for run in runs for file, content in state.items()})
    checkpoint.prune(files.join(place.url, "lr[1]"), 6, keep=1)
    checkpoint.prune(files.join(place.url, "lr*"), 6, keep=1)
    for run, left in {"lr[1]": 2, "lr1": 6, "lr*": 2, "lrx": 6}.items():
        found = [path for path in place.seen() if path.startswith(f"{run}/")]
        assert len(found) == left, run


def test_packing_over_a_data_set_leaves_those_that_a_pattern_would_hit(
    s3: str, object_store: ObjectStore, pack_files: PackFiles, photos: Contents
) -> None:
    place = Place(s3, object_store)
    few_photos = dict(list(photos.items())[::9])
    for name in ("set1", "set[1]"):
        pack_files(files.join(place.url, name), few_photos)
    before = {path: body for path, body in place.seen().items() if path.startswith("set1/")}
    others = dict(list(photos.items())[1::9])
    images = [pack.Image(path, len(content), -1) for path, content in others.items()]
    plan = pack.plan_shards(pack.ImageSet("", images, []), 50_000, seed=0)
    url = files.join(place.url, "set[1]")
    pack.write_shards(plan, url, lambda image: others[image.path], threads=2, overwrite=True)
    after = {path: body for path, body in place.seen().items() if path.startswith("set1/")}
    assert len(before) > 1
    assert after == before


def test_names_are_no_markup_where_they_are_told(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich would take `[red]` out of a line, and raise at `[/b]`."""
    run = f"{tmp_path}/lr[red]/a[/b]"
    recipe = tiny.recipe(tiny_data, run, steps=1, probe=tiny.NO_PROBE)
    train(recipe)
    assert run in capsys.readouterr().out
    assert evaluate.main(["knn", run, "--threads", "1"]) == 0
    assert run in capsys.readouterr().out
    assert export.main([run, f"{tmp_path}/out[/b]", "--format", "safetensors"]) == 0
    assert f"{tmp_path}/out[/b]/card.json" in capsys.readouterr().out
    photos = tmp_path / "photos[/b]"
    photos.mkdir(parents=True)
    (photos / "0.jpg").write_bytes(draw_photo(0, 20, 20))
    pack_command.main((str(photos), f"{tmp_path}/packed[red][/b]"), threads=1)
    assert f"{tmp_path}/packed[red][/b]/index.json" in capsys.readouterr().out
