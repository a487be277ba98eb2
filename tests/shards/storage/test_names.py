"""What was read from a file leads nowhere but to plain places: URLs, and names of files."""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.processes.world import World
from engine.state import checkpoint
from launch import evaluate, export
from shards import index as indexes
from shards.errors import InputError
from shards.index import Index
from shards.loader import DataConfig
from shards.storage import files, names
from tests.helpers import tiny
from tests.helpers.training import train

ALONE = World(0, 1, 1, torch.device("cpu"))
PLAIN = [
    *("", "data/train", "/data/train", "s3://b/a", "s3a://b/a", "gs://b/a", "gcs://b/a"),
    *("abfs://c@a.dfs.core.windows.net/a", "https://host/a?token=1", "http://host/a"),
    *("file:///data", "s3://b/[1]*?#%41", "C:data"),
]
FOREIGN = [
    *("reference::file:///evil", "reference://evil", "simplecache::s3://b/a", "s3://b/a::x"),
    *("filecache::https://h/a", "zip://a::s3://b/a.zip", "memory://a", "ftp://h/a", "data:,a"),
    *("github://o:r@/a", "S3://b/a", "dir::a", "tar://x", "ssh://h/a", "git://a", "s3://b/\0"),
]
FOLDER = "a/b"  # A shard may lie below the folder of its index.
OUTSIDE = [
    *("../outside.tar", "/etc/passwd", "a/../../b", "", ".", "..", "a\0b", "a\\..\\b", FOLDER),
    *("\ud800", "s3://b/a", "file:///a"),
]
OTHER_TYPES = [7, None, ["a.tar"], {"a": 1}, 1.5, True]


@pytest.mark.parametrize("url", PLAIN)
def test_plain_urls(url: str) -> None:
    assert names.check_url(url, "data.train", "recipe.json") == url


@pytest.mark.parametrize("url", [*FOREIGN, *OTHER_TYPES])
def test_other_urls_are_refused_in_one_line(url: object) -> None:
    with pytest.raises(InputError) as error:
        names.check_url(url, "data.train", "s3://b/run/recipe.json")
    assert str(error.value).startswith("s3://b/run/recipe.json: data.train ")
    assert str(error.value).endswith("give it by hand: --data.train URL")
    assert str(error.value).isprintable()


def test_secrets_of_a_foreign_url_are_not_shown() -> None:
    with pytest.raises(InputError) as error:
        names.check_url("simplecache::s3://key:s3cret@b/a?token=t0ken", "data.val", "f")
    assert not re.search("s3cret|t0ken", str(error.value))


@given(st.text())
def test_a_plain_name_stays_in_its_folder(name: str) -> None:
    told = ""
    try:
        names.check_name(name, "f", "m")
    except InputError as error:
        told = str(error)
    if told:
        assert told.isprintable()
        return
    folder = Path("/folder")
    assert (folder / name).parent == folder
    assert folder / name != folder
    assert "\0" not in name


@pytest.mark.parametrize("name", [*OUTSIDE, *OTHER_TYPES])
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(InputError, match=r"^index\.json: .*; pack again$"):
        names.check_name(name, "index.json", "pack again")


# Where they are read -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*(n for n in OUTSIDE if n != FOLDER), "a/../b", "a//b", "./a", *OTHER_TYPES]
)
def test_an_index_with_a_shard_elsewhere(
    packed: Index, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest is right: whoever writes the file can compute that too."""
    url = files.join(packed.url, indexes.NAME)
    packed.shards[0].name = name
    document = packed.document(inline=True)
    (Path(packed.url) / indexes.NAME).write_text(json.dumps(document))
    opened: list[str] = []
    read = files.read

    def note(url: str, *more: Any) -> bytes:
        opened.append(url)
        return read(url, *more)

    monkeypatch.setattr(files, "read", note)
    with pytest.raises(InputError) as error:
        indexes.load(packed.url, "data.train")
    assert str(error.value).startswith(f"data.train {packed.url}: index.json: ")
    assert "\n" not in str(error.value)
    assert opened == [url]


@pytest.fixture(scope="module")
def trained(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    run = tmp_path_factory.mktemp("names") / "run"
    train(tiny.recipe(tiny_data, run, steps=1, probe=tiny.NO_PROBE))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be harmed."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_commit_with_a_file_elsewhere(run: Path, name: str) -> None:
    url = checkpoint.step_url(str(run), 1)
    path = Path(url, checkpoint.COMMIT)
    document = json.loads(path.read_text())
    document["files"][name] = [3, 0]
    document["digest"] = checkpoint._digest(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="no plain name of a file in its folder"):
        checkpoint.verify(url, ALONE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *product(["files"], [[], 7, {"a": 1}, {"a": [1, "2"]}, {"a": [1, -1]}]),
        *product(["step"], ["1", -1, 1.5, True, None]),
        *product(["method"], [[], "a", None]),
        *product(["files"], [{"a": [1, 2**32]}, {"a": [1e400, 1]}, {"a": [True, 1]}, {"a": [1]}]),
        *product(["step"], [10**18, 10**30, 1e400, "../1"]),
        ("index_digest", 7),
    ],
)
def test_a_commit_of_other_types_is_damaged(run: Path, key: str, value: object) -> None:
    url = checkpoint.step_url(str(run), 1)
    path = Path(url, checkpoint.COMMIT)
    document = json.loads(path.read_text()) | {key: value}
    document["digest"] = checkpoint._digest(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=rf"commit\.json is damaged: {key}.* must be "):
        checkpoint.verify(url, ALONE)


def test_a_commit_of_another_step(run: Path) -> None:
    url = checkpoint.step_url(str(run), 1)
    other = checkpoint.step_url(str(run), 2)
    Path(url).rename(other)
    with pytest.raises(InputError, match=r"is damaged: step is 1, not that of the folder's name$"):
        checkpoint.verify(other, ALONE)


@pytest.mark.parametrize(
    "content", [b"[" * 10**6, b'{"a": 1, "a": 2}', b"\xff", b"[]", b"1" * 9999]
)
def test_a_commit_that_is_no_document(run: Path, content: bytes) -> None:
    url = checkpoint.step_url(str(run), 1)
    Path(url, checkpoint.COMMIT).write_bytes(content)
    with pytest.raises(InputError, match=r"commit\.json is damaged"):
        checkpoint.verify(url, ALONE)


def plant(run: Path, **values: object) -> None:
    """Have the run's recipe.json say something else."""
    path = run / "recipe.json"
    fields = json.loads(path.read_text()) | {n.replace("_", ".", 1): v for n, v in values.items()}
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("url", [*FOREIGN, *OTHER_TYPES])
@pytest.mark.parametrize("field", ["data_train", "data_val"])
def test_an_evaluation_opens_no_foreign_url(
    run: Path,
    field: str,
    url: object,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(run, **{field: url})
    known = fsspec.get_filesystem_class

    def get(protocol: str) -> Any:
        assert protocol in names.SCHEMES, f"{protocol} was opened"
        return known(protocol)

    monkeypatch.setattr(fsspec, "get_filesystem_class", get)
    monkeypatch.setattr(fsspec.core, "get_filesystem_class", get)
    monkeypatch.setattr(fsspec.core, "filesystem", lambda protocol, **more: get(protocol)(**more))
    assert evaluate.main(["knn", str(run), "--threads", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {run}/recipe.json: {field.replace('_', '.')} ")


def test_a_url_given_by_hand_takes_the_place_of_a_foreign_one(
    run: Path, tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(run, data_train="reference::file:///evil", data_val="reference::file:///evil")
    given = ["--data.train", tiny_data.train, "--data.val", tiny_data.val, "--threads", "1"]
    assert evaluate.main(["knn", str(run), *given, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert export.main([str(run), str(tmp_path / "export")]) == 0
    assert "data.val" in capsys.readouterr().out  # told, and compared on random images only


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *product(["precision"], ["fp8", 7, None, ["fp32"]]),
        *product(["views.size"], ["32", 0, 10**9, None, 8.5, True]),
        *product(["model.encoder.depth"], [51, "18", None]),
        *product(["model.encoder.width"], ["1", 1e9, -1, None, float("nan")]),
        *product(["probe.crop"], [0, float("nan"), [0.5]]),
        ("seed", -1),
    ],
)
def test_a_method_of_other_types_is_damaged(
    run: Path, name: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(checkpoint.step_url(str(run), 1), checkpoint.COMMIT)
    document = json.loads(path.read_text())
    document["method"][name] = value
    document["digest"] = checkpoint._digest(document)
    path.write_text(json.dumps(document))
    assert evaluate.main(["knn", str(run), "--threads", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"its recipe is damaged: {name} must be " in line


@pytest.mark.parametrize("network", ["online", "untrained"])
def test_an_encoder_larger_than_its_files_is_not_built(
    run: Path, network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within the bounds of a recipe, this one would take 400 GB."""
    path = Path(checkpoint.step_url(str(run), 1), checkpoint.COMMIT)
    document = json.loads(path.read_text())
    document["method"] |= {"model.encoder.width": 64.0, "model.encoder.depth": 200}
    document["digest"] = checkpoint._digest(document)
    path.write_text(json.dumps(document))
    assert evaluate.main(["knn", str(run), "--threads", "1", "--network", network]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "its recipe is damaged: the encoder has 1,0" in line
