"""URLs one level too high or too low: the message ends in what was meant."""

import re

import pytest

from engine.encoder.source import EncoderConfig, open_encoder
from engine.state import checkpoint, layout
from launch import pack as packing
from shards import index as indexes
from shards.errors import InputError
from shards.loader import DataConfig
from shards.making.image_folders import find_images
from shards.making.tars import find_tars
from shards.storage import files, misplaced
from tests.engine.state.test_checkpoint import ALONE
from tests.helpers import tiny

PLACES = (
    *("set/train/index.json", "set/train/shard-000000.tar", "set/val/index.json"),
    *("runs/a/recipe.json", "runs/a/metrics.jsonl", "runs/a/checkpoints/step_00000004/commit.json"),
    *("tars/train/a.tar", "photos/cat/1.jpg"),
)


@pytest.fixture
def place(store: str) -> str:
    """A folder in which lie a data set, a run, tars and images, as far as their names tell."""
    for name in PLACES:
        files.write(f"{store}/{name}", b"{}")
    return store


def told(pattern: str, place: str) -> str:
    return re.escape(pattern.replace("PLACE", files.redact(place))) + "$"


@pytest.mark.parametrize(
    ("url", "field", "end"),
    [
        ("set", "data.train", "PLACE/set/train: give that folder"),
        ("set", "data.val", "PLACE/set/val: give that folder"),
        ("set/train/index.json", "data.train", "PLACE/set/train: give that folder"),
        ("set/train/shard-000000.tar", "data.val", "PLACE/set/train: give that folder"),
        ("set/train/shard-{000..147}.tar", "data.val", "PLACE/set/train: give that folder"),
        ("tars/train", "data.train", "python launch/pack.py --index-only PLACE/tars/train"),
        ("nothing", "data.train", "or index existing tars with its --index-only"),
    ],
)
def test_data(url: str, field: str, end: str, place: str) -> None:
    with pytest.raises(InputError, match=told(end, place)) as caught:
        indexes.load(f"{place}/{url}", field)
    assert f"{field} {files.redact(place)}/{url}: no index.json there; " in str(caught.value)


@pytest.mark.parametrize(
    ("url", "end"),
    [
        ("runs", "; give PLACE/runs/a"),
        ("runs/a/recipe.json", "; give PLACE/runs/a"),
        ("runs/a/metrics.jsonl", "; give PLACE/runs/a"),
        ("runs/a/checkpoints", "; give PLACE/runs/a/checkpoints/step_00000004"),
        (f"{PLACES[5]}", "; give PLACE/runs/a/checkpoints/step_00000004"),
        ("set/train", "no committed checkpoint there"),
        ("runs/b", "; runs beside it: PLACE/runs/a"),
        ("runs/aa/checkpoints/step_00000004", "; did you mean PLACE/runs/a?"),
        ("runs/a/checkpoints/step_4", "; give PLACE/runs/a/checkpoints/step_00000004"),
        (
            "runs/a/checkpoints/step_2700",
            "; PLACE/runs/a/checkpoints holds the steps 4: give "
            "PLACE/runs/a/checkpoints/step_00000004, for instance",
        ),
    ],
)
def test_checkpoints(url: str, end: str, place: str) -> None:
    with pytest.raises(InputError, match=told(end, place)):
        checkpoint.find(f"{place}/{url}", ALONE, print)
    with pytest.raises(InputError, match=told(end, place)):
        open_encoder(f"{place}/{url}", EncoderConfig(), ALONE, print)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("CHECKPOINT", "give PLACE/exported/encoder.safetensors"),
        ("checkpoint.branch", "--model.start PLACE/exported/encoder.safetensors starts from its "),
    ],
)
def test_an_export_is_not_a_run(name: str, end: str, place: str) -> None:
    for file in ("card.json", "encoder.pth", "encoder.safetensors"):
        files.write(f"{place}/exported/{file}", b"{}")
    text = f"{name} PLACE/exported: no committed checkpoint there; it holds files of weights: {end}"
    with pytest.raises(InputError, match=re.escape(text.replace("PLACE", files.redact(place)))):
        checkpoint.find(f"{place}/exported", ALONE, print, name)
    typo = f"{place}/exported/encoder.safetensor"
    with pytest.raises(InputError, match=r"; did you mean .*/exported/encoder.safetensors\?$"):
        open_encoder(typo, EncoderConfig(), ALONE, print)


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("s3://b/set/index.json", "s3://b/set"),
        ("s3://b/set/shard-000000.tar/", "s3://b/set"),
        ("s3://b/run/recipe.json", "s3://b/run"),
        ("runs/a/checkpoints/step_00000004", "runs/a"),
        ("runs/a/checkpoints/step_00000004/commit.json", "runs/a"),
        ("index.json", "."),
    ],
)
def test_runs(url: str, folder: str) -> None:
    with pytest.raises(InputError, match=rf"^run .* is inside of {folder}: give the folder of a"):
        tiny.recipe(DataConfig(train="set"), url, probe=tiny.NO_PROBE).check()


@pytest.mark.parametrize(
    "url",
    [
        *("runs/checkpoints", "s3://b/r.json5", "step_00000004", "tar", "a::b", "/a", "."),
        *("s3://b/runs", "s3://arn:aws:s3:eu:1:accesspoint/door/run", "memory://run"),
    ],
)
def test_other_names_of_runs(url: str) -> None:
    layout.check_run(url)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://b//", "s3://b//: is a whole bucket, .* such as s3://b/runs/mine$"),
        ("s3://b", "s3://b: is a whole bucket, .*: give a folder there, such as s3://b/runs/mine$"),
        ("gs://b", "gs://b: is a whole bucket, .* such as gs://b/runs/mine$"),
        ("s3://arn:aws:s3:eu:1:accesspoint/door", "s3://arn:.*: is a whole bucket"),
        ("/", "/: is a whole disk, where .*: give a folder there, such as /runs/mine$"),
        ("/tmp/..", "/tmp/..: is a whole disk"),
    ],
)
def test_a_run_at_a_root(url: str, told: str) -> None:
    with pytest.raises(InputError, match=f"^run {told}"):
        tiny.recipe(DataConfig(train="set"), url, probe=tiny.NO_PROBE).check()


@pytest.mark.parametrize(
    ("url", "end"),
    [
        ("photos/cat/1.jpg", "; give the folder PLACE/photos/cat"),
        ("set/train/index.json", "; give the folder PLACE/set/train"),
    ],
)
def test_images_to_pack(url: str, end: str, place: str) -> None:
    with pytest.raises(InputError, match=told(end, place)):
        find_images(f"{place}/{url}")


@pytest.mark.parametrize(
    ("url", "end"),
    [
        ("set/train/index.json", "; give the folder PLACE/set/train"),
        ("photos", "no .tar files there: .jpg files (1)"),
    ],
)
def test_tars_to_index(url: str, end: str, place: str) -> None:
    with pytest.raises(InputError, match=told(end, place)):
        find_tars([f"{place}/{url}"])


@pytest.mark.parametrize("name", ["index.json", "shard-000000.tar"])
def test_a_folder_to_pack_to(name: str) -> None:
    with pytest.raises(InputError, match=r"^OUT s3://b/set/.*: give s3://b/set$"):
        packing.main(("photos", f"s3://b/set/{name}"))


def test_what_cannot_be_read_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(url: str) -> bool:
        raise PermissionError(url)

    monkeypatch.setattr(files, "exists", deny)
    monkeypatch.setattr(files, "list_names", deny)
    assert misplaced.find_near("s3://b/set/train", "index.json") == []
