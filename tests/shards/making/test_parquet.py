"""Parquet files of the Hub are packed: by which columns, classes and splits."""

import builtins
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from launch import pack as pack_command
from shards import index
from shards.errors import InputError
from shards.making.repack import Repacking, find_packed_images
from shards.making.tars import find_tars
from shards.samples import Layout
from tests.shards.test_dimensions import encode

JPEG, PNG = encode(8, 8, "JPEG"), encode(8, 8, "PNG")
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
NAMES = ["tench", "crane", "crane"]


def write(
    path: Path, columns: dict[str, tuple[Any, list[Any]]], features: dict[str, Any] | None = None
) -> Path:
    """Write a parquet file with columns of (type, values), and the Hub's description of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema(
        [(name, kind) for name, (kind, _) in columns.items()],
        metadata=described if features is not None else None,
    )
    values = {name: rows for name, (_, rows) in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(values, schema=schema), path, row_group_size=2)
    return path


def write_hub(path: Path, labels: list[int | None], names: list[str] = NAMES) -> Path:
    images = [{"bytes": JPEG, "path": f"n{row}.x.JPEG"} for row in range(len(labels))]
    return write(
        path,
        {"image": (IMAGE, images), "label": (pyarrow.int64(), labels)},
        {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}},
    )


def find(tmp_path: Path, *sources: Path, **options: Any) -> Repacking:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    plain: dict[str, Any] = {"layout": Layout(), "classes_from": "labels", "classes": None}
    return find_packed_images(
        find_tars([str(source) for source in sources], compressed=True),
        **(plain | {"skip_damaged": False} | options),
        threads=2,
        scratch=f"{tmp_path}/scratch",
        report=lambda _: None,
    )


def labels(found: Repacking) -> dict[str, list[int]]:
    return {part.name: [image.label for image in part.images] for part in found.sets}


def test_splits_and_classes_of_a_hub_data_set(tmp_path: Path) -> None:
    data = tmp_path / "hub" / "data"
    write_hub(data / "train-00000-of-00002.parquet", [2, 0, 1])
    write_hub(data / "train-00001-of-00002-0a1b2c3d.parquet", [1, None])
    write_hub(data / "validation-00000-of-00001.parquet", [1])
    write_hub(data / "test-00000-of-00001.parquet", [-1, -1])
    (tmp_path / "hub" / "README.md").write_text("x")
    found = find(tmp_path, tmp_path / "hub")
    assert labels(found) == {"test": [-1, -1], "train": [2, 0, 1, 1, -1], "validation": [1]}
    assert {part.name: part.classes for part in found.sets} == {
        "test": [],
        "train": NAMES,
        "validation": NAMES,
    }
    (image,) = found.sets[2].images
    assert image.path == "data/validation-00000-of-00001.parquet/00000000_n0_x.jpeg"
    assert found.read(image) == JPEG
    assert found.read(image, 2, 5) == JPEG[2:5]
    assert found.left_out == {".md files": (1, "README.md")}


def test_folders_that_name_the_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_hub(tmp_path / "default" / split / "0000.parquet", [0])
    assert labels(find(tmp_path, tmp_path / "default")) == {"test": [0], "train": [0]}


def test_the_command_packs_and_indexing_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_hub(tmp_path / "train-00000-of-00001.parquet", [0, 1, 2, 0])
    with pytest.raises(InputError, match=r"compressed, .*pack\.py SOURCE OUT"):
        pack_command.main((str(path),), index_only=True)
    pack_command.main((str(path), f"{tmp_path}/out"))
    packed = index.load(f"{tmp_path}/out", "OUT")
    assert (packed.samples, packed.classes) == (4, NAMES)
    pack_command.main((str(path), f"{tmp_path}/out"))  # finds the same plan
    assert "already packed" in capsys.readouterr().out


def test_bytes_without_a_description(tmp_path: Path) -> None:
    columns: dict[str, tuple[Any, list[Any]]] = {
        "id": (pyarrow.int64(), [7, 8, 9]),
        "jpg": (pyarrow.large_binary(), [PNG, None, JPEG]),
        "Label": (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["cat", "cat", None]),
    }
    found = find(tmp_path, write(tmp_path / "a.parquet", columns))
    (part,) = found.sets
    assert [(image.path, image.label) for image in part.images] == [
        ("a.parquet/00000000.png", 0),
        ("a.parquet/00000002.jpg", -1),
    ]
    assert part.classes == ["cat"]
    assert found.left_out == {"rows without an image": (1, "a.parquet: row 1")}


def test_rows_that_hold_paths_alone(tmp_path: Path) -> None:
    images = [{"bytes": None, "path": "/home/them/a.png"}, None, {"bytes": PNG, "path": None}]
    found = find(tmp_path, write(tmp_path / "a.parquet", {"image": (IMAGE, images)}))
    assert {reason: left.number for reason, left in found.left_out.items()} == {
        "rows whose image is the path of a file, and not its content": 1,
        "rows without an image": 1,
    }
    assert labels(found) == {"": [-1]}
    assert found.warnings == ["1 of 1 samples have no label"]


def test_columns_that_the_user_names(tmp_path: Path) -> None:
    classes = {"_type": "ClassLabel", "names": ["a", "b"]}
    images = [{"bytes": JPEG, "path": None}, {"bytes": PNG, "path": None}]
    number = pyarrow.int64()
    path = write(
        tmp_path / "cifar.parquet",
        {
            "img": (IMAGE, images),
            "mask": (IMAGE, images[::-1]),
            "fine": (number, [0, 1]),
            "coarse": (number, [1, 0]),
            "box": (pyarrow.list_(number), [[1], [2]]),
            "weight": (pyarrow.float64(), [2.0, float("nan")]),
        },
        {"img": {"_type": "Image"}, "fine": classes, "coarse": classes},
    )
    with pytest.raises(InputError, match=r"fine, coarse could be meant: name one by --label$"):
        find(tmp_path, path)
    assert labels(find(tmp_path, path, layout=Layout(label="coarse"))) == {"": [1, 0]}
    found = find(tmp_path, path, layout=Layout(image="mask", label="weight"))
    assert labels(found) == {"": [2, -1]}  # 2.0 is the class 2, and NaN is no label
    assert found.read(found.sets[0].images[0]) == PNG
    for layout, error in (
        (Layout(label="none"), r"--label none: no such column: it has img, mask, fine"),
        (Layout(label="box"), r"column box holds list.*, no labels: name another one by --label"),
        (Layout(image="fine", label="fine"), r"the column fine holds int64, no image files"),
    ):
        with pytest.raises(InputError, match=error):
            find(tmp_path, path, layout=layout)


def test_files_that_cannot_be_packed(tmp_path: Path) -> None:
    text = {"text": (pyarrow.string(), ["a"])}
    with pytest.raises(InputError, match="no column holds images: it has text"):
        find(tmp_path, write(tmp_path / "text.parquet", text))
    with pytest.raises(InputError, match="a parquet file has no folders: leave it out"):
        find(tmp_path, tmp_path / "text.parquet", classes_from="folders")
    two = {"a": (IMAGE, [None]), "b": (IMAGE, [None])}
    with pytest.raises(InputError, match="a, b could be meant: name one by --image"):
        find(tmp_path, write(tmp_path / "two.parquet", two))
    write_hub(tmp_path / "mixed" / "0.parquet", [0])
    write_hub(tmp_path / "mixed" / "1.parquet", [0], ["x"])
    with pytest.raises(InputError, match=r"other classes than each other \(3 and 1 names\)"):
        find(tmp_path, tmp_path / "mixed")
    found = find(tmp_path, tmp_path / "mixed", classes=["p", "q"])
    assert found.sets[0].classes == ["p", "q"]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    path = write_hub(tmp_path / "a" / "1.parquet", [0] * 40)
    write_hub(tmp_path / "a" / "0.parquet", [0])
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-100:]
    else:
        content[8:200] = bytes(192)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"1\.parquet: damaged: .* restore it, or use --skip-dam"):
        find(tmp_path, tmp_path / "a")
    assert labels(find(tmp_path, tmp_path / "a", skip_damaged=True)) == {"": [0]}


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, load = write_hub(tmp_path / "a.parquet", [0]), builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return load(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"needs `pip install 'byol-engine\[parquet\]'`"):
        find(tmp_path, path)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shards.making.parquet._add", fail)
    with pytest.raises(InputError, match=r"no room to unpack it to .*: set TMPDIR"):
        find(tmp_path, write_hub(tmp_path / "a.parquet", [0]))
