"""Packing straight to a real S3 server: the bytes of a local packing, whatever stops it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launch import pack as pack_command
from shards import index
from shards.index import Index
from shards.making import pack
from shards.making.image_folders import find_images
from shards.storage import files
from tests.conftest import Files
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.places import ROOT
from tests.helpers.tars import make_index, write_tar
from tests.helpers.zips import write_zip


def pack_files(
    files: Files, url: str, read: Callable[[str], bytes], shard_bytes: int = 50_000
) -> Index:
    classes = sorted({path.split("/")[0] for path in files})
    images = [
        pack.Image(path, len(content), classes.index(path.split("/")[0]))
        for path, content in sorted(files.items())
    ]
    plan = pack.plan_shards(pack.ImageSet("", images, classes), shard_bytes, seed=0)
    return pack.write_shards(plan, url, lambda image: read(image.path), threads=2)[0]


def contents(url: str) -> Files:
    return {name: files.read(f"{url}/{name}") for name, _ in files.walk(url)}


def test_as_on_a_disk(proxy: FaultProxy, s3: str, photos: Files, tmp_path: Path) -> None:
    for path, content in photos.items():
        files.write(f"{s3}/photos/{path}", content)
    proxy.set({"slow_down": 0.05, "drop": 0.05})
    (found,), others, _ = find_images(f"{s3}/photos")
    assert (len(found.images), others) == (90, {})
    packed = pack_files(photos, f"{s3}/out", lambda path: files.read(f"{s3}/photos/{path}"))
    local = pack_files(photos, f"{tmp_path}/out", photos.__getitem__)
    assert packed.digest == local.digest
    assert contents(f"{s3}/out") == contents(f"{tmp_path}/out")
    assert proxy.counts()["slow_down"] > 0
    assert proxy.counts()["drop"] > 0


@pytest.mark.parametrize("images_before", [0, 30, 75])
def test_a_stopped_packing_goes_on(
    proxy: FaultProxy, s3: str, photos: Files, tmp_path: Path, images_before: int
) -> None:
    taken: list[str] = []

    def dying(path: str) -> bytes:
        taken.append(path)
        if len(taken) > images_before:
            raise OSError("the source is gone")
        return photos[path]

    with pytest.raises(OSError, match="the source is gone"):
        pack_files(photos, f"{s3}/out", dying)
    assert not files.exists(f"{s3}/out/{index.NAME}")
    written = {name for name in files.list_names(f"{s3}/out") if name.endswith(".tar")}
    assert len(written) >= (2 if images_before == 75 else 0)
    before = len(proxy.log)
    pack_files(photos, f"{s3}/out", photos.__getitem__)
    puts = [r.path for r in proxy.log[before:] if r.method == "PUT"]
    again = {name for name in written if any(f"/{name}?" in f"{path}?" for path in puts)}
    assert again == set()
    pack_files(photos, f"{tmp_path}/out", photos.__getitem__)
    assert contents(f"{s3}/out") == contents(f"{tmp_path}/out")


def test_a_large_shard_goes_up_in_parts(proxy: FaultProxy, s3: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    files = {f"a/{i}.jpg": generator.bytes(1 << 20) for i in range(34)}
    pack_files(files, f"{s3}/out", files.__getitem__, shard_bytes=10**9)
    assert proxy.requests(r"shard-000000\.tar\?.*partNumber=", "PUT") == 3
    assert proxy.requests(r"shard-000000\.tar$", "PUT") == 0
    pack_files(files, f"{tmp_path}/out", files.__getitem__, shard_bytes=10**9)
    assert contents(f"{s3}/out") == contents(f"{tmp_path}/out")


def test_index_only(
    proxy: FaultProxy, s3: str, photos: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "BLOCK_BYTES", 12_000)
    pack_files(photos, f"{tmp_path}/tars", photos.__getitem__)
    files.remove(f"{tmp_path}/tars/{index.NAME}")
    for name, content in contents(f"{tmp_path}/tars").items():
        files.write(f"{s3}/tars/{name}", content)
    proxy.set({"slow_down": 0.1, "drop": 0.1, "truncate": 0.1}, only=r"\.tar")
    found, local = (make_index(url) for url in (f"{s3}/tars", f"{tmp_path}/tars"))
    assert found.samples == 90
    assert found.document(inline=True) == local.document(inline=True)
    assert index.load(f"{s3}/tars", "data.train").digest == found.digest
    assert proxy.counts()["drop"] > 0


def test_no_bucket_is_told_before_anything_is_read(proxy: FaultProxy, photo_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "launch/pack.py", str(photo_folder), "s3://no-such-bucket/out"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: s3://no-such-bucket/out: ")
    assert line.endswith("create the bucket, or correct the URL")
    assert "Traceback" not in done.stderr
    assert proxy.requests() == proxy.requests(method="GET") == 1


@pytest.mark.parametrize(("size", "share"), [(100_000, 0.2), (2_000, 1.0)])
def test_indexing_reads_few_of_the_bytes(
    proxy: FaultProxy, s3: str, tmp_path: Path, size: int, share: float
) -> None:
    """Headers and labels come in one pass, and what lies between them stays where it is."""
    total = 0
    for k in range(2):
        members: dict[str, bytes] = {}
        for i in range(40):
            members |= {f"{i:04d}.cls": b"%d" % (i % 7), f"{i:04d}.jpg": bytes([i]) * size}
        content = write_tar(tmp_path / f"{k}.tar", members).read_bytes()
        files.write(f"{s3}/tars/{k}.tar", content)
        total += len(content)
    made = make_index(f"{s3}/tars")
    assert (made.samples, len(made.classes)) == (80, 7)
    assert proxy.bytes_sent(r"\.tar$") <= share * total


def test_a_zip_file_is_read_image_by_image(
    proxy: FaultProxy, s3: str, photos: Files, photo_folder: Path, tmp_path: Path
) -> None:
    """What a failed request had to fetch is fetched again, and no byte for nothing."""
    content = write_zip(tmp_path / "a.zip", photos).read_bytes()
    files.write(f"{s3}/a.zip", content)
    pack_command.main((str(photo_folder), f"{tmp_path}/out"))
    pack_command.main((f"{s3}/a.zip", f"{tmp_path}/zipped"))
    assert contents(f"{tmp_path}/zipped") == contents(f"{tmp_path}/out")
    directory = min(len(content), files.READ_BLOCK)
    assert proxy.bytes_sent(r"a\.zip$") <= len(content) + 2 * directory
    assert proxy.requests(r"a\.zip$", "GET") <= len(photos) + 3
    proxy.set({"slow_down": 0.1, "drop": 0.1, "truncate": 0.1}, only=r"\.zip")
    pack_command.main((f"{s3}/a.zip", f"{tmp_path}/again"))
    assert contents(f"{tmp_path}/again") == contents(f"{tmp_path}/out")
    assert proxy.counts()["drop"] > 0
