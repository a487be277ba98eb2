"""Labels that stand apart from their images: every form of table that people have, or a refusal."""

from pathlib import Path

import pytest

from launch import pack as pack_command
from shards import index
from shards.errors import InputError
from shards.making.image_folders import Found, find_images
from shards.making.label_table import LabelTable
from tests.conftest import draw_photo
from tests.helpers.tars import write_tar
from tests.shards.making.test_pack import write_files

PHOTOS = ["a.jpg", "b c.JPG", "deep/d.png", "e,f.jpeg"]
LABELS = {"a.jpg": "ant", "b c.JPG": "bee", "deep/d.png": "ant", "e,f.jpeg": "cat"}


def find(
    folder: Path, photos: list[str], table: str | bytes, column: str = "", **options: object
) -> Found:
    source, path = write_files(folder / "in", photos), folder / "labels"
    path.write_bytes(table if isinstance(table, bytes) else table.encode())
    given = LabelTable(str(path), column, report=lambda _: None, **options)  # type: ignore[arg-type]
    return find_images(str(source), table=given)


def name_classes(found: Found) -> dict[str, str]:
    return {
        image.path: part.classes[image.label] if image.label >= 0 else ""
        for part in found.sets
        for image in part.images
    }


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ('id,label\na,ant\nb c,bee\nd,ant\n"e,f",cat\n', ""),
        ('name;diagnosis\r\na.jpg;ant\r\nb c.JPG;bee\r\nd.png;ant\r\n"e,f.jpeg";cat\r\n', ""),
        ("\ufeffa.jpg\tant\nb c.JPG\tbee\ndeep/d.png\tant\ne,f.jpeg\tcat", ""),
        ("a.jpg ant\nb c.JPG bee\ndeep/d.png ant\ne,f.jpeg cat\n\n", ""),
        ('\ufeffclass,path\nant,./a.JPG\nbee,/in/b c.jpg\nant,deep\\d.PNG\ncat,"e,f"\n', ""),
        (
            "id,path,width,Species\n"
            '1,in/a.jpg,7,ant\n2,in/b c.JPG,8,bee\n3,in/deep/d.png,9,ant\n4,"in/e,f.jpeg",9,cat\n',
            "species",
        ),
        ('x,y,label,kind\n1,a,ant,1\n1,b c,bee,2\n1,d,ant,1\n1,"e,f",cat,1\n', ""),
        ('"a","ant",""\n"b c","bee",""\n"d","ant",""\n"e,f","cat",""\n', ""),
        ('a,ant,x\nb c,bee,x\nd,ant,x\n"e,f",cat,x\n', "2"),
        (',image_id,label\n0,a,ant\n1,b c,bee\n2,d,ant\n3,"e,f",cat\n', ""),
    ],
)
def test_tables_in_the_forms_of_people(tmp_path: Path, table: str, column: str) -> None:
    found = find(tmp_path, PHOTOS, table, column)
    assert name_classes(found) == LABELS
    assert (found.left_out, found.warnings) == ({}, [])
    assert found.sets[0].classes == ["ant", "bee", "cat"]


def test_a_label_may_hold_spaces_where_a_name_holds_none(tmp_path: Path) -> None:
    found = find(tmp_path, ["a.jpg", "b.jpg"], "a.jpg fire ant\nb.jpg bee\n")
    assert name_classes(found) == {"a.jpg": "fire ant", "b.jpg": "bee"}


def test_numbers_are_class_indices(tmp_path: Path) -> None:
    photos = [f"{i}.jpg" for i in range(1, 5)]
    found = find(tmp_path, photos, "label,id\n10,1\n2.0,2\n0,3\n-1,4\n")
    assert [image.label for image in found.sets[0].images] == [10, 2, 0, -1]
    assert found.sets[0].classes == [str(i) for i in range(11)]
    found = find(tmp_path, photos, "label,id\n1,1\n0,2\n0,3\n1,4\n", classes=["no", "yes"])
    assert list(name_classes(found).values()) == ["yes", "no", "no", "yes"]


def test_the_order_of_names_may_be_given(tmp_path: Path) -> None:
    found = find(tmp_path, ["1.jpg", "2.jpg"], "1,low\n2,high\n", classes=["low", "mid", "high"])
    assert [image.label for image in found.sets[0].images] == [0, 2]
    assert found.warnings == ["classes without an image: mid"]
    with pytest.raises(InputError, match="--classes does not name 'high'"):
        find(tmp_path, ["1.jpg", "2.jpg"], "1,low\n2,high\n", classes=["low"])


def test_rows_without_images_and_images_without_rows_are_told(tmp_path: Path) -> None:
    found = find(tmp_path, ["a.jpg", "b.jpg", "c.jpg"], "id,label\nx,cat\na,ant\nb,\ny,bee\n")
    assert name_classes(found) == {"a.jpg": "ant", "b.jpg": "", "c.jpg": ""}
    assert found.left_out == {"rows of --labels that name no image of SOURCE": (2, "x")}
    assert found.warnings == [
        "2 of 3 images have no row in --labels, or no label there, such as b.jpg",
        "classes without an image: bee, cat",
    ]


@pytest.mark.parametrize("first", ["10", "10.jpg"])
def test_a_first_row_without_an_image_is_no_header(tmp_path: Path, first: str) -> None:
    found = find(tmp_path, ["11.jpg", "12.jpg"], f"{first},1\n11,0\n12,1\n")
    assert found.left_out["rows of --labels that name no image of SOURCE"] == (1, first)
    assert [image.label for image in found.sets[0].images] == [0, 1]


def test_sets_packed_apart_with_one_table_have_the_same_classes(tmp_path: Path) -> None:
    table = "id,label\na,ant\nb,bee\nc,cat\n"
    one = find(tmp_path / "1", ["a.jpg"], table).sets[0]
    two = find(tmp_path / "2", ["b.jpg", "c.jpg"], table).sets[0]
    assert one.classes == two.classes == ["ant", "bee", "cat"]


def test_a_split_that_the_table_does_not_name_keeps_the_classes_of_its_folders(
    tmp_path: Path,
) -> None:
    photos = ["train/ant/1.jpg", "train/bee/2.jpg", "val/day1/3.jpg", "val/4.jpg", "test/5.jpg"]
    found = find(tmp_path, photos, "3 bee\n4 ant\n")
    assert {part.name: part.classes for part in found.sets} == {
        "train": ["ant", "bee"],
        "val": ["ant", "bee"],
        "test": [],
    }
    assert name_classes(found) == {
        **{"train/ant/1.jpg": "ant", "train/bee/2.jpg": "bee", "test/5.jpg": ""},
        **{"val/day1/3.jpg": "bee", "val/4.jpg": "ant"},
    }
    assert found.warnings == []
    found = find(tmp_path, photos, "3 -1\n4 ant\n")
    assert found.sets[1].classes == ["ant", "bee"]
    assert [image.label for image in found.sets[1].images] == [0, -1]
    with pytest.raises(InputError, match=r"are numbers, such as 0, but folders .* such as ant: wr"):
        find(tmp_path, photos, "3 1\n4 0\n")


def test_the_longer_path_decides(tmp_path: Path) -> None:
    photos = ["train/1.jpg", "val/1.jpg"]
    found = find(tmp_path, photos, "train/1.jpg,ant\nval/1.jpg,bee\n")
    assert list(name_classes(found).values()) == ["ant", "bee"]
    found = find(tmp_path / "top", ["1.jpg", "x/1.jpg"], "1.jpg,ant\nx/1.jpg,bee\n")
    assert name_classes(found) == {"1.jpg": "ant", "x/1.jpg": "bee"}
    found = find(tmp_path / "off", ["2.jpg", "x/2.jpg"], "2,ant\ny/2.jpg,bee\n")
    assert name_classes(found) == {"2.jpg": "ant", "x/2.jpg": ""}


@pytest.mark.parametrize(
    ("photos", "table", "column", "text"),
    [
        (
            ["a/1.jpg", "b/1.jpg"],
            "1,x\n",
            "",
            "1 could be 2 images of SOURCE, such as a/1.jpg: wri",
        ),
        (["1.jpg", "1.png"], "1,x\n", "", r"1 could be 2 images of SOURCE, such as 1\.jpg"),
        (["1.jpg"], "1,x\n1.jpg,y\n", "", r"1\.jpg has 2 labels, such as 'x' and 'y': leave one"),
        (["1.jpg"], "490\n361\n", "", "its lines hold one field each, so no label .* ImageNet's"),
        (["1.jpg"], "2.jpg,x\n", "", r"names no image of SOURCE, such as 1\.jpg"),
        (["1.jpg"], "", "", r"names no image of SOURCE, such as 1\.jpg"),
        (["1.jpg"], "1.jpg,\n", "", "names images, but no class of them"),
        (["1.jpg"], "id,a,b\n1,x,y\n", "", "a, b could be meant: name one by --label"),
        (["1.jpg"], "id,a,b\n1,x,y\n", "c", "--label c: no such column: it has id, a, b"),
        (
            ["1.jpg", "2.jpg"],
            "1,x\n2,x,y\n",
            "",
            "row 2 has 3 fields, and the first row has 2: put",
        ),
        (["1.jpg"], "1,\xe9\n".encode("latin-1"), "", "is no text in UTF-8"),
        (
            ["1.jpg"],
            "ImageId,PredictionString\n1,n01 1 2 3 4 n02 1 2 3 4\n",
            "",
            "'n01 1 2 3 4 n02 1 2 3 4' is not one class with its boxes",
        ),
    ],
)
def test_what_is_not_clear_is_refused(
    tmp_path: Path, photos: list[str], table: str | bytes, column: str, text: str
) -> None:
    with pytest.raises(InputError, match=f"^--labels {tmp_path}/labels: .*{text}"):
        find(tmp_path, photos, table, column)


def test_no_such_table(tmp_path: Path) -> None:
    source = str(write_files(tmp_path / "in", ["1.jpg"]))
    for options, told in (
        ({"labels": "nowhere.csv"}, r"^--labels nowhere\.csv: no such file$"),
        ({"labels": source}, f"^--labels {source}: is a folder: give the file$"),
        ({"labels": "s3:/b/x.csv"}, "^--labels s3:/b/x.csv: a URL has two slashes"),
        ({"label": "x.csv"}, r"^--label x\.csv: names a field .*: a table is --labels x\.csv$"),
    ):
        with pytest.raises(InputError, match=told):
            pack_command.main((source, f"{tmp_path}/out"), **options)  # type: ignore[arg-type]


# The command


def write_photos(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(draw_photo(number, 20, 20))
    return folder


@pytest.mark.parametrize("kind", ["folder", "tar", "memory"])
def test_the_command(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{i:03}.v1.jpg" for i in range(6)]
    source = str(write_photos(tmp_path / "in", names))
    if kind == "tar":
        photos = {f"x/{name}": (tmp_path / "in" / name).read_bytes() for name in names}
        source = str(write_tar(tmp_path / "0.tar", photos))
    table = tmp_path / "train.csv"
    table.write_text("id,label\n" + "".join(f"{i:03}.v1,{'ab'[i % 2]}\n" for i in range(6)))
    out = f"{tmp_path}/out" if kind != "memory" else "memory://out-labels"
    options = {"labels": str(table), "dotted": kind == "tar"}
    pack_command.main((source, out), **options)  # type: ignore[arg-type]
    packed = index.load(out, "data.train")
    assert (packed.samples, packed.classes) == (6, ["a", "b"])
    assert "the column id names 6 of 6 images, and the column label" in capsys.readouterr().err
    pack_command.main((source, out), **options)  # type: ignore[arg-type]
    assert capsys.readouterr().out.startswith("already packed: 6 samples, 2 classes")
    table.write_text(table.read_text().replace("000.v1,a", "000.v1,b"))
    with pytest.raises(InputError, match=r"holds other shards \(another source, labels, seed"):
        pack_command.main((source, out), **options)  # type: ignore[arg-type]


def test_labels_of_tars_are_those_of_the_table(tmp_path: Path) -> None:
    photo = draw_photo(0, 20, 20)
    members = {"1.jpg": photo, "1.cls": b"7", "2.jpg": photo, "3.tif.jpg": photo}
    source = write_tar(tmp_path / "0.tar", members)
    (tmp_path / "t").write_text("images/1.jpg ant\nimages/2.jpg bee\n")
    pack_command.main((str(source), f"{tmp_path}/out"), labels=f"{tmp_path}/t")
    assert index.load(f"{tmp_path}/out", "OUT").classes == ["ant", "bee"]


def test_a_strict_packing_fails_for_rows_without_an_image(tmp_path: Path) -> None:
    source = str(write_photos(tmp_path / "in", ["1.jpg"]))
    (tmp_path / "t").write_text("1 ant\n2 bee\n")
    with pytest.raises(InputError, match="--strict: 1 was left out"):
        pack_command.main((source, f"{tmp_path}/out"), labels=f"{tmp_path}/t", strict=True)


def test_an_index_takes_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--index-only copies no images: .*--labels"):
        pack_command.main((str(tmp_path),), index_only=True, labels="t")
