"""What a folder of images holds: classes, splits, and what is left out and why."""

import os
from pathlib import Path

import pytest

from launch import pack as pack_command
from shards import index
from shards.errors import InputError
from shards.making.image_folders import find_images
from shards.making.label_table import LabelTable
from shards.making.left_out import LeftOut
from shards.making.pack import plan_shards, write_shards
from shards.storage import files
from tests.helpers.tars import write_tar
from tests.shards.test_dimensions import encode


def write_files(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("train", "val"), ["train", "val"]),
        (("Test", "Train"), ["train", "test"]),
        (("TRAIN", "VAL", "TEST"), ["train", "val", "test"]),
        (("training", "testing"), ["train", "test"]),
        (("training_set", "test_set"), ["train", "test"]),
        (("Training Data", "eval"), ["train", "val"]),
        (("train-images", "val split"), ["train", "val"]),
        (("train", "dev"), ["train", "val"]),
        (("train", "valid"), ["train", "valid"]),
        (("validation", "train"), ["train", "validation"]),
        (("train",), ["train"]),
    ],
)
def test_splits_in_the_spellings_of_people(
    tmp_path: Path, folders: tuple[str, ...], names: list[str]
) -> None:
    photos = [f"{folder}/{name}/{i}.jpg" for folder in folders for name in "ab" for i in (1, 2)]
    sets, left_out, warnings = find_images(str(write_files(tmp_path / "in", photos)))
    assert [part.name for part in sets] == names
    assert all(part.classes == ["a", "b"] for part in sets)
    assert all(len(part.images) == 4 for part in sets)
    assert (left_out, warnings) == ({}, [])


def test_two_folders_are_not_one_split(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", ["Train/a/1.jpg", "training/b/2.jpg"])
    with pytest.raises(InputError, match="Train and training are both the split train"):
        find_images(str(source))


@pytest.mark.parametrize(
    ("photos", "warning"),
    [
        (["images/1.jpg", "images/2.jpg"], "there is one class only, images: is SOURCE one folder"),
        (["photos/train/a/1.jpg"], "there is one class only, photos: is SOURCE one folder too"),
        (["train/a/1.jpg", "val/a/2.jpg"], "there is one class only, a: is SOURCE one folder too"),
        (["bus/1.jpg", "Train/2.jpg"], "Train became a class, but the name is that of a split"),
        (["1.jpg", "2.jpg"], ""),
        (["ant/1.jpg", "bee/2.jpg"], ""),
    ],
)
def test_what_looks_wrong_is_warned_of(tmp_path: Path, photos: list[str], warning: str) -> None:
    warnings = find_images(str(write_files(tmp_path / "in", photos))).warnings
    assert len(warnings) == bool(warning)
    assert all(text.startswith(warning) for text in warnings)


def test_what_is_left_out_is_told_with_a_reason_and_an_example(tmp_path: Path) -> None:
    good = ["ant/1.jpg", "bee/b.jpg/2.JPEG"]
    junk = [
        *("ant/._1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "__MACOSX/ant/1.jpg"),
        *("ant/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "@eaDir/thumb.jpg", ".DS_Store"),
        "$RECYCLE.BIN/1.jpg",
    ]
    others = ["ant/Thumbs.db", "desktop.ini", "a.psd", "b.PSD", "README", "jpg"]
    (images,), left_out, _ = find_images(str(write_files(tmp_path / "in", good + junk + others)))
    assert [image.path for image in images.images] == good
    assert images.classes == ["ant", "bee"]
    assert {reason: left.number for reason, left in left_out.items()} == {
        "hidden files and files of file managers": len(junk),
        ".db files": 1,
        ".ini files": 1,
        ".psd files": 2,
        "files without an extension": 2,
    }
    assert left_out[".db files"] == LeftOut(1, "ant/Thumbs.db")
    assert left_out["hidden files and files of file managers"].example in junk


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", ["bus/1.jpg", "train/2.jpg"])
    sets, *_ = find_images(str(source))
    assert [part.classes for part in sets] == [["bus", "train"]]
    write_files(source, ["val/3.jpg"])
    with pytest.raises(InputError, match="holds train and val, but bus too"):
        find_images(str(source))


def test_links_and_what_is_no_file(tmp_path: Path) -> None:
    """What a link leads to outside of the source is packed only when that is asked for."""
    write_files(tmp_path / "elsewhere", ["1.jpg", "secret"])
    source = write_files(tmp_path / "in", ["a/2.jpg"])
    (source / "b").symlink_to(tmp_path / "elsewhere")
    (source / "a" / "3.jpg").symlink_to(tmp_path / "elsewhere" / "secret")
    (source / "a" / "4.jpg").symlink_to("2.jpg")
    (source / "a" / "5.jpg").symlink_to("nowhere.jpg")
    (source / "a" / "6.jpg").symlink_to("6.jpg")
    (source / "a" / "7.jpg").symlink_to("/dev/zero")
    (source / "a" / "up").symlink_to("..")
    os.mkfifo(source / "a" / "8.jpg")
    outside = "links to files outside of the folder, which --follow-links takes"
    sets, left_out, _ = find_images(str(source))
    assert [image.path for image in sets[0].images] == ["a/2.jpg", "a/4.jpg"]
    counts = {
        outside: 3,
        "links that lead nowhere": 2,
        "links to a folder that they lie in": 1,
        "pipes, sockets and devices": 1,
    }
    assert {reason: left.number for reason, left in left_out.items()} == counts
    sets, left_out, _ = find_images(str(source), follow_links=True)
    paths = ["a/2.jpg", "a/3.jpg", "a/4.jpg", "b/1.jpg"]
    assert [image.path for image in sets[0].images] == paths
    assert outside not in left_out
    assert left_out["pipes, sockets and devices"].number == 2


@pytest.mark.parametrize("follow_links", [False, True])
def test_links_in_a_circle_end(tmp_path: Path, follow_links: bool) -> None:
    source = write_files(tmp_path / "in", ["a/1.jpg", "b/2.jpg"])
    (source / "a" / "l1").symlink_to("../b")
    (source / "b" / "l2").symlink_to("../a")
    sets, left_out, _ = find_images(str(source), follow_links=follow_links)
    paths = ["a/1.jpg", "a/l1/2.jpg", "b/2.jpg", "b/l2/1.jpg"]
    assert [image.path for image in sets[0].images] == paths
    assert set(left_out) == {"links to a folder that they lie in"}
    assert left_out["links to a folder that they lie in"].number == 2


def test_links_out_of_the_source_and_back_end(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", ["a/1.jpg"])
    out = write_files(tmp_path / "out", ["2.jpg", "deep/3.jpg"])
    (source / "a" / "there").symlink_to(out)
    (out / "deep" / "back").symlink_to(source)
    (out / "deep" / "top").symlink_to("/")
    sets, left_out, _ = find_images(str(source), follow_links=True)
    paths = ["a/1.jpg", "a/there/2.jpg", "a/there/deep/3.jpg"]
    assert [image.path for image in sets[0].images] == paths
    assert set(left_out) == {"links to a folder that they lie in"}
    assert left_out["links to a folder that they lie in"].number == 2


def test_links_to_folders_of_the_source_are_taken_and_told(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", ["a/1.jpg", "b/2.jpg"])
    (source / "a" / "l1").symlink_to("../b")
    sets, left_out, warnings = find_images(str(source))
    assert [image.path for image in sets[0].images] == ["a/1.jpg", "a/l1/2.jpg", "b/2.jpg"]
    assert left_out == {}
    assert warnings[0] == (
        "1 link leads to a folder of SOURCE itself, such as a/l1: images that are taken there too "
        "are taken twice"
    )
    (source / ".store").symlink_to("b")
    (source / "c").symlink_to("b")
    _, _, warnings = find_images(str(source))
    assert warnings[0].startswith("2 links lead to folders of SOURCE itself, such as a/l1: ")


def test_a_source_that_is_a_link(tmp_path: Path) -> None:
    write_files(tmp_path / "photos", ["a/1.jpg", "b/2.jpg"])
    (tmp_path / "in").symlink_to("photos")
    sets, left_out, _ = find_images(f"{tmp_path}/in")
    assert (len(sets[0].images), left_out) == (2, {})


def test_empty_class_folders_are_classes(tmp_path: Path) -> None:
    """Otherwise, the labels of a split without one class would mean other classes."""
    source = write_files(tmp_path / "in", ["val/ant/1.jpg", "val/cat/2.jpg", "train/ant/1.jpg"])
    for name in ("val/bee", "train/bee", "train/cat"):
        (source / name).mkdir()
    sets, left_out, warnings = find_images(str(source))
    assert [part.classes for part in sets] == [["ant", "bee", "cat"]] * 2
    assert warnings == [
        "classes without an image in train: bee, cat",
        "classes without an image in val: bee",
    ]
    alone, _, warnings = find_images(f"{source}/val")
    assert [image.label for image in alone[0].images] == [0, 2]
    assert (left_out, warnings) == ({}, ["classes without an image: bee"])


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", ["caf\udce9/1.jpg", "th\u00e9/2.jpg"])
    sets, *_ = find_images(str(source))
    assert sets[0].classes == ["caf\\xe9", "th\u00e9"]
    made, _ = write_shards(
        plan_shards(sets[0], 10**6, 0),
        f"{tmp_path}/out",
        lambda image: files.read(f"{source}/{image.path}"),
        threads=1,
    )
    assert index.load(f"{tmp_path}/out", "data.train").classes == made.classes


def test_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SOURCE .*/missing: no such folder$"):
        find_images(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"SOURCE .*no images there, of jpg, jpeg, png, webp, .*"):
        find_images(str(tmp_path / "empty"))
    write_files(tmp_path / "tars", ["shard-0.tar"])
    assert find_images(str(tmp_path / "tars")).sets == []
    write_files(tmp_path / "others", ["a/1.heic", "b.txt"])
    with pytest.raises(InputError, match=r"no images there: .*\.heic files \(1\)"):
        find_images(str(tmp_path / "others"))


@pytest.mark.parametrize("name", ["a.tar", "a.TAR.GZ", "b/a.tgz"])
def test_tars_in_the_place_of_images_and_beside_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / name).write_bytes(b"")
    assert find_images(str(tmp_path)).sets == []
    (tmp_path / "b" / "cover.jpg").write_bytes(b"")
    found = find_images(str(tmp_path))
    assert len(found.sets[0].images) == 1
    assert f"{name} is a tar, whose images are not taken" in found.warnings[0]


def test_folders_below_a_class_are_told(tmp_path: Path) -> None:
    flat, deep = ["ant/0.jpg", "bee/0.jpg"], ["ant/x/y/1.jpg", "bee/x/2.jpg"]
    (told,) = find_images(str(write_files(tmp_path / "deep", flat + deep))).warnings
    assert told == (
        "2 images lie in folders below that of a class, such as ant/x/y/1.jpg, whose class is ant"
    )
    names = [f"{split}/{path}" for split in ("train", "val") for path in flat]
    (told,) = find_images(str(write_files(tmp_path / "in", [*names, "val/bee/x/1.jpg"]))).warnings
    assert told == (
        "1 image lies in folders below that of a class, such as val/bee/x/1.jpg, whose class is bee"
    )


def test_a_folder_that_holds_all_of_a_split_is_no_class(tmp_path: Path) -> None:
    """As in Tiny ImageNet."""
    photos = ["train/ant/images/1.jpg", "train/bee/images/2.jpg", "val/images/3.jpg"]
    source = str(write_files(tmp_path / "in", [*photos, "test/images/4.jpg"]))
    found = find_images(source)
    assert [part.classes for part in found.sets] == [["ant", "bee"], [], []]
    assert found.warnings[:2] == [
        f"images of {split} lie in one folder, images, which is no class elsewhere: no label"
        for split in ("val", "test")
    ]
    (tmp_path / "in" / "val_annotations.txt").write_text("3.JPG\tbee\t0\t9\n")
    table = LabelTable(f"{tmp_path}/in/val_annotations.txt", "2", report=lambda _: None)
    found = find_images(source, table=table)
    assert [part.classes for part in found.sets] == [["ant", "bee"], ["ant", "bee"], []]
    assert [image.label for part in found.sets for image in part.images] == [0, 1, 1, -1]
    one = find_images(str(write_files(tmp_path / "one", ["train/ant/1.jpg", "val/ant/2.jpg"])))
    assert [part.classes for part in one.sets] == [["ant"], ["ant"]]


def test_folders_that_name_no_classes(tmp_path: Path) -> None:
    """With labels, images at the top have none, which is told. Without, nobody has one."""
    photos = ["2019/Monday/1.jpg", "2020/2.jpg", "3.jpg", "4.jpg"]
    source = str(write_files(tmp_path / "in", photos))
    found = find_images(source)
    assert found.sets[0].classes == ["2019", "2020"]
    assert found.warnings[0] == "2 images lie in no folder of a class, such as 3.jpg: no label"
    (part,), left_out, warnings = find_images(source, labels=False)
    assert [image.path for image in part.images] == sorted(photos)
    assert {image.label for image in part.images} == {-1}
    assert (part.classes, left_out, warnings) == ([], {}, [])
    splits = str(
        write_files(tmp_path / "splits", [f"{a}/{b}/1.jpg" for a in ("train", "val") for b in "xy"])
    )
    assert [(s.name, s.classes) for s in find_images(splits, labels=False).sets] == [
        ("train", []),
        ("val", []),
    ]


def test_an_empty_folder_beside_a_flat_set_is_no_class(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", ["1.jpg", "2.jpg"])
    (source / "empty").mkdir()
    (part,), _, warnings = find_images(str(source))
    assert (part.classes, warnings) == ([], [])


@pytest.mark.parametrize("tars", [False, True])
def test_the_command_packs_without_classes(tmp_path: Path, tars: bool) -> None:
    jpeg = encode(8, 8, "JPEG")
    if tars:
        write_tar(tmp_path / "in" / "0.tar", {"a/1.jpg": jpeg, "a/1.cls": b"3", "b/2.jpg": jpeg})
    else:
        for name in ("a", "b"):
            (tmp_path / "in" / name).mkdir(parents=True)
            (tmp_path / "in" / name / "1.jpg").write_bytes(jpeg)
    pack_command.main((f"{tmp_path}/in", f"{tmp_path}/out"), classes_from="none")
    packed = index.load(f"{tmp_path}/out", "OUT")
    assert (packed.samples, packed.classes) == (2, [])
