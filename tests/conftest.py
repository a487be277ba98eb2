"""Fixtures that several test files share: small images, and shards made of them."""

import io
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image as PillowImage

from shards import index as index_module
from shards.index import Index
from shards.loader import DataConfig
from shards.making import pack
from shards.storage import retries
from tests.helpers import object_store as object_store_module
from tests.helpers import tiny
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.object_store import ObjectStore, lead_to
from tests.helpers.ranks import Ranks
from tests.helpers.training import train

Files = dict[str, bytes]
PackFiles = Callable[[str, Files], Index]


def pytest_configure(config: pytest.Config) -> None:
    """Hide a machine's GPUs from all tests but those of `-m gpu`.

    The others start more processes than there may be GPUs, and expect the arithmetic of a CPU.
    """
    chosen = config.getoption("markexpr")
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def draw_photo(seed: int, width: int, height: int, form: str = "JPEG") -> bytes:
    """A smooth random picture, as file bytes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    picture = PillowImage.fromarray(coarse).resize((width, height), PillowImage.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def photos() -> Files:
    """90 JPEGs in three classes, of many sizes, by path: `ant/a0.jpg`."""
    return {
        f"{name}/{name[0]}{i}.jpg": draw_photo(100 * c + i, 40 + i, 70 - i)
        for c, name in enumerate(("ant", "bee", "cat"))
        for i in range(30)
    }


@pytest.fixture
def photo_folder(photos: Files, tmp_path: Path) -> Path:
    """The photos as files."""
    folder = tmp_path / "photos"
    for path, content in photos.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def pack_files(monkeypatch: pytest.MonkeyPatch) -> PackFiles:
    """Packs files held in memory: (URL, files by `class/name.jpg`) -> Index."""
    # Blocks of a few samples, so that little data has many.
    monkeypatch.setattr(index_module, "BLOCK_BYTES", 12_000)

    def pack_them(url: str, files: Files) -> Index:
        classes = sorted({path.split("/")[0] for path in files})
        images = [
            pack.Image(path, len(content), classes.index(path.split("/")[0]))
            for path, content in sorted(files.items())
        ]
        plan = pack.plan_shards(pack.ImageSet("", images, classes), 50_000, seed=0)
        result, _ = pack.write_shards(plan, url, lambda image: files[image.path], threads=2)
        return result

    return pack_them


@pytest.fixture
def packed(pack_files: PackFiles, photos: Files, tmp_path: Path) -> Index:
    """The photos in about five shards of about four blocks each, on disk."""
    return pack_files(str(tmp_path / "packed"), photos)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes that act as ranks."""
    pool = Ranks(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A drawn training and validation set, for `tests.helpers.tiny.recipe`."""
    return tiny.draw_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def whole_run(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `tiny.recipe` from the first step to the last, to be read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(tiny.recipe(tiny_data, run))
    return run


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """A real S3 server, started by the first test that asks for it."""
    if reason := object_store_module.missing():
        pytest.skip(reason)
    with object_store_module.serve() as store:
        yield store


@pytest.fixture
def s3(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a new bucket; s3:// URLs lead to the store, here and in processes started now."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield object_store.bucket()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def proxy(
    object_store: ObjectStore, s3: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """Between s3:// URLs and the store; harmless until it is told otherwise."""
    assert s3  # which leads them to the store first
    monkeypatch.setattr(retries, "BACKOFF", 0.005)
    with FaultProxy(object_store.endpoint, 0, {}) as between:
        lead_to(between.endpoint, monkeypatch)
        yield between


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL where nothing is yet."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return str(tmp_path) if request.param == "local" else f"memory://{secrets.token_hex(6)}"
