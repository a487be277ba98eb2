"""The commands of the README pack ImageNet as people have it, here a small set of the same form."""

import csv
import io
import re
import runpy
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from shards import index
from shards.index import Index
from shards.matching import check_same_classes
from shards.reader import BlockReader
from tests.conftest import draw_photo
from tests.helpers.places import ROOT
from tests.helpers.tars import write_tar
from tests.helpers.zips import write_zip

CLASSES = ["n01440764", "n01443537", "n02119789"]
TRUTH = [2, 0, 1, 1, 2, 0]  # the class of each validation image
IDS = [3, 1, 2]  # the class of each number of the development kit, from 1 on: never the alphabet's
SECTION = (ROOT / "shards" / "README.md").read_text().partition("### ImageNet\n")[2]
SECTION = SECTION.partition("\n### ")[0]

TRAIN = {
    f"{name}_{i}.JPEG": draw_photo(10 * c + i, 24, 24)
    for c, name in enumerate(CLASSES)
    for i in (7, 31)
}
VAL = {f"ILSVRC2012_val_{i + 1:08}.JPEG": draw_photo(99 + i, 24, 24) for i in range(len(TRUTH))}


def run_commands(monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    """Run the commands of the README that name the file `of`."""
    lines = re.findall(r"^python (launch/pack\.py .*)$", SECTION, re.MULTILINE)
    found = [line for line in lines if of in line]
    assert found
    for line in found:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        runpy.run_path(str(ROOT / "launch" / "pack.py"), run_name="__main__")


def read_classes(packed: Index) -> dict[bytes, str]:
    """The class of each image, by its content."""
    block = BlockReader(packed).fetch(0, 0)
    found = {}
    for row, sample in enumerate(block.samples):
        assert sample.image is not None
        start, size = sample.image
        found[bytes(block.content[start : start + size])] = packed.classes[block.label(row)]
    return found


def check_sets() -> None:
    train, val = (index.load(f"data/imagenet/{name}", "data") for name in ("train", "val"))
    check_same_classes(train, val)
    assert train.classes == CLASSES
    assert read_classes(train) == {photo: name.partition("_")[0] for name, photo in TRAIN.items()}
    truth = [CLASSES[label] for label in TRUTH]
    assert read_classes(val) == dict(zip(VAL.values(), truth, strict=True))


def test_two_tars_and_the_development_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tars = {}
    for name in CLASSES:
        photos = {path: photo for path, photo in TRAIN.items() if path.startswith(name)}
        tars[f"{name}.tar"] = write_tar(tmp_path / f"{name}.tar", photos).read_bytes()
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", tars)
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", VAL)
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    truth = [IDS.index(label + 1) + 1 for label in TRUTH]
    numbers = "".join(f"{number}\n" for number in truth)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(numbers)
    (code,) = re.findall(r"<!-- devkit -->\n```python\n(.*?)```", SECTION, re.DOTALL)
    exec(code, stub_scipy(monkeypatch))
    run_commands(monkeypatch, "ILSVRC2012_img_")
    check_sets()


def stub_scipy(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What reads `meta.mat` needs scipy, which the tests do not. It gives such an array."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [(i + 1, CLASSES[label - 1], 0) for i, label in enumerate(IDS)]
    synsets = np.array([*rows, (len(IDS) + 1, "n00001740", 3)], dtype=kinds)
    scipy, inner = types.ModuleType("scipy"), types.ModuleType("scipy.io")
    inner.loadmat = lambda path, squeeze_me: {"synsets": synsets}  # type: ignore[attr-defined]  # noqa: ARG005
    scipy.io = inner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scipy", scipy)
    monkeypatch.setitem(sys.modules, "scipy.io", inner)
    return {}


def test_numbers_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count in an order of the kit's own, so that their classes would be others."""
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", VAL)
    (tmp_path / "val.csv").write_text("1\n2\n3\n3\n2\n1\n")
    with pytest.raises(
        SystemExit, match=r"error: --labels val\.csv: its lines hold one field each"
    ):
        run_commands(monkeypatch, "ILSVRC2012_img_val")


def test_the_zip_file_of_kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = "ILSVRC/Data/CLS-LOC"
    entries = {"ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml": b"<annotation/>"}
    entries |= {f"{data}/test/ILSVRC2012_test_0000000{i}.JPEG": draw_photo(i, 9, 9) for i in (1, 2)}
    entries |= {f"{data}/train/{n.partition('_')[0]}/{n}": photo for n, photo in TRAIN.items()}
    entries |= {f"{data}/val/{name}": photo for name, photo in VAL.items()}
    entries |= {"ILSVRC/ImageSets/CLS-LOC/val.txt": b"ILSVRC2012_val_00000001 1\n"}
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(["ImageId", "PredictionString"])
    for name, label in reversed([*zip(VAL, TRUTH, strict=True)]):
        boxes = f"{CLASSES[label]} 85 1 499 272 " * (1 + label)  # an image may hold several
        table.writerow([name.removesuffix(".JPEG"), boxes])
    entries["LOC_val_solution.csv"] = rows.getvalue().encode()
    write_zip(tmp_path / "imagenet-object-localization-challenge.zip", entries)
    (tmp_path / "LOC_val_solution.csv").write_text(rows.getvalue())  # as `unzip` does
    run_commands(monkeypatch, "imagenet-object-localization-challenge.zip")
    check_sets()
    test = index.load("data/imagenet/test", "data")
    assert (test.samples, test.classes) == (2, [])
