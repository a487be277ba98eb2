"""The drawn images: pure functions of their ids, and no class that pixels give away."""

from pathlib import Path

import numpy as np
import pytest
import webdataset

from shards import index
from shards.errors import InputError
from shards.making import synthetic


def test_pure_in_seed_and_id() -> None:
    ids = np.arange(1000, 1040)
    images, labels = synthetic.draw(3, ids, 32)
    assert images.shape == (40, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == (ids % 8).tolist()
    some = np.array([17, 3, 30])
    again, _ = synthetic.draw(3, ids[some], 32)
    np.testing.assert_array_equal(again, images[some])
    assert not np.array_equal(synthetic.draw(4, ids, 32)[0], images)


def test_images_are_gray_and_use_the_range() -> None:
    images, _ = synthetic.draw(0, np.arange(64), 24)
    assert (images[..., :1] == images).all()
    assert 90 < images.mean() < 165
    assert images.reshape(64, -1).std(1).min() > 10


def test_raw_pixels_tell_little() -> None:
    images, labels = synthetic.draw(0, np.arange(1200), 32)
    flat = images[..., 0].reshape(len(images), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    near = np.argsort(-(flat[1000:] @ flat[:1000].T), axis=1)[:, :20]
    votes = np.array([np.bincount(row, minlength=8).argmax() for row in labels[:1000][near]])
    assert (votes == labels[1000:]).mean() < 0.45


def test_write(tmp_path: Path) -> None:
    url = str(tmp_path / "drawn")
    written = synthetic.write(url, 50, 16, seed=1)
    assert index.load(url, "data.train").digest == written.digest
    assert written.classes == list(synthetic.CLASSES)
    images, _ = synthetic.draw(1, np.arange(50), 16)
    shards = [written.shard_url(i) for i in range(len(written.shards))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 50
    for sample in samples:
        name = sample["__key__"].split("_")[1]
        texture = name.rstrip("0123456789")
        assert synthetic.CLASSES[sample["cls"]] == texture
        np.testing.assert_array_equal(sample["png"], images[int(name.removeprefix(texture))])

    assert synthetic.write(url, 50, 16, seed=1).digest == written.digest
    with pytest.raises(InputError, match="holds other shards"):
        synthetic.write(url, 51, 16, seed=1)
