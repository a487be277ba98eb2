"""Subsets: as many of each class, by file name, the same bytes, by several processes as by one."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shards import index as indexes
from shards.errors import InputError
from shards.index import Index
from shards.making import subset
from shards.reader import BlockReader
from tests.conftest import Files, PackFiles, draw_photo


def ignore(_: str) -> None:
    pass


def contents(index: Index) -> dict[str, tuple[bytes, int]]:
    """Image bytes and label of every sample, by its name without packing's number."""
    reader, found = BlockReader(index), {}
    for shard in range(len(index.shards)):
        for number in range(len(index.blocks(shard))):
            block = reader.fetch(shard, number)
            for row, sample in enumerate(block.samples):
                assert sample.image is not None
                start, size = sample.image
                name = sample.key.split("_")[-1]
                found[name] = bytes(block.content[start : start + size]), block.label(row)
    return found


def test_a_fraction_of_each_class() -> None:
    labels = np.array([0] * 100 + [1] * 30 + [2] * 4 + [-1] * 50)
    chosen = subset.choose(labels, 0.1, seed=0)
    assert Counter(labels[chosen].tolist()) == {0: 10, 1: 3, 2: 1}  # one at least, none without
    assert np.array_equal(chosen, np.unique(chosen))
    assert np.array_equal(chosen, subset.choose(labels, 0.1, seed=0))
    assert not np.array_equal(chosen, subset.choose(labels, 0.1, seed=1))
    more = subset.choose(labels, 0.2, seed=0)
    assert set(chosen) < set(more)  # 1% is a part of 10%


def test_images_are_copied_byte_for_byte(packed: Index, photos: Files, tmp_path: Path) -> None:
    places = subset.find_places(packed, (0, 1), ignore)
    some = places.take(subset.choose(places.labels, 0.2, seed=0))
    url = str(tmp_path / "some")
    subset.write(packed, some, url, threads=2)
    subset.write(packed, some, url, threads=2)  # stands already
    made = indexes.load(url, "data.train")
    assert made.classes == packed.classes
    found = contents(made)
    by_stem = {path.split("/")[1][:-4]: (path.split("/")[0], file) for path, file in photos.items()}
    assert len(found) == made.samples == len(some.ids) == 18
    assert Counter(label for _, label in found.values()) == {0: 6, 1: 6, 2: 6}
    for name, (content, label) in found.items():
        assert (made.classes[label], content) == by_stem[name]


def test_parts_join_to_the_whole(packed: Index) -> None:
    whole = subset.find_places(packed, (0, 1), ignore)
    assert whole.ids.tolist() == list(range(90))
    joined = subset.Places.join([subset.find_places(packed, (i, 3), ignore) for i in range(3)])
    assert joined.names == whole.names
    for name in ("ids", "labels", "spans"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name))


def test_a_published_list(packed: Index) -> None:
    places = subset.find_places(packed, (0, 1), ignore)
    names = ["ant/a3.jpg", "b7.JPEG", "", "cat/c29"]
    chosen = places.take(subset.find_listed(places, packed.classes, names, "list"))
    assert sorted(name.split("_")[-1] for name in chosen.names) == ["a3.jpg", "b7.jpg", "c29.jpg"]
    with pytest.raises(InputError, match=r"list: zebra\.jpg is not in data\.train"):
        subset.find_listed(places, packed.classes, ["a3.jpg", "zebra.jpg"], "list")
    with pytest.raises(InputError, match="list: names no image"):
        subset.find_listed(places, packed.classes, ["", " "], "list")


def test_a_name_that_several_classes_have(pack_files: PackFiles, tmp_path: Path) -> None:
    photos = {f"{c}/{i}.jpg": draw_photo(i, 40, 40) for c in ("ant", "bee") for i in range(3)}
    index = pack_files(str(tmp_path / "same"), photos)
    places = subset.find_places(index, (0, 1), ignore)
    chosen = subset.find_listed(places, index.classes, ["bee/0.jpg", "some/where/ant/2"], "list")
    assert sorted(places.labels[chosen].tolist()) == [0, 1]
    with pytest.raises(InputError, match=r"list: 1\.jpg stands for 2 images of .*class's folder"):
        subset.find_listed(places, index.classes, ["1.jpg"], "list")
