"""The input pipeline: its batches are those computed one sample at a time, whatever runs beside."""

import io
import itertools
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor

from shards import index as index_module
from shards.center_crops import CropReader
from shards.decode import Box, PixelRules, center_box, crop_into, crop_resize, decode
from shards.errors import InputError
from shards.index import Index
from shards.loader import CHUNK, Assignment, Batch, Chunk, DataConfig, TrainLoader
from shards.order import Order, rank_streams
from shards.orientation import make_exif
from shards.reader import BlockReader
from shards.samples import Block
from shards.storage import files
from shards.views import ViewsConfig, crop_box, draw_views
from tests.conftest import Files, PackFiles, draw_photo

VIEWS = ViewsConfig(size=16)
SEED = 11


def ignore(_: str) -> None:
    pass


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all threads work, although the images are small."""
    monkeypatch.setattr("shards.decode_threads.COST_OF_A_THREAD", 1e-9)


@contextmanager
def loading(
    order: Order, *, streams: range | None = None, audit: bool = False, **options: Any
) -> Iterator[TrainLoader]:
    corrupt, report = options.pop("corrupt", 0.01), options.pop("report", ignore)
    config = DataConfig(train=order.index.url, audit=audit, corrupt=corrupt)
    streams = range(order.streams) if streams is None else streams
    assigned: dict[str, Any] = {"views": VIEWS, "config": config, "threads": 2} | options
    loader = TrainLoader(Assignment(order, streams, **assigned), report)
    try:
        yield loader
    finally:
        loader.close()


class Reference:
    """Batches in the plainest way: tars by the standard library, one sample after another."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.images: list[bytes] = []
        self.labels: list[int] = []
        for i in range(len(order.index.shards)):
            with tarfile.open(order.index.shard_url(i)) as archive:
                for member in archive:
                    file = archive.extractfile(member)
                    assert file is not None
                    if member.name.endswith(".cls"):
                        self.labels.append(int(file.read()))
                    else:
                        self.images.append(file.read())

    def batch(self, step: int, streams: range, micros: int) -> Batch:
        given = [
            [i for s in self.order.batch_segments(step, c) for i in s.ids.tolist()] for c in streams
        ]
        part = self.order.rows // micros
        planned = [
            i for m in range(micros) for ids in given for i in ids[m * part : (m + 1) * part]
        ]
        epoch = step // self.order.steps_per_epoch
        ids = [self.good(i) for i in planned]
        draws = draw_views(SEED, epoch, np.array(ids), VIEWS)
        views = torch.stack(
            [
                torch.stack([self.view(i, draws.crop[v, n]) for n, i in enumerate(ids)])
                for v in range(2)
            ]
        )
        crcs = [
            zlib.crc32(views[:, n].permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            for n in range(len(ids))
        ]
        labels = torch.tensor([self.labels[i] for i in ids])
        params = torch.from_numpy(draws.params)
        return Batch(views, params, np.array(ids), labels, np.array(crcs, np.uint32))

    def view(self, sample: int, crop: NDArray[np.float64]) -> Tensor:
        image = decode(bytearray(self.images[sample]), 0, len(self.images[sample]))
        box = crop_box(crop, image.shape[1], image.shape[2], VIEWS)
        return crop_resize(image, box, VIEWS.size)

    def good(self, sample: int) -> int:
        """The sample, or the next good one of its block, wrapping."""
        found, first = self.order.index, 0
        counts = np.concatenate([found.blocks(i)[:, 1] for i in range(len(found.shards))])
        for count in map(int, counts):
            if sample < first + count:
                break
            first += count
        ring: list[int] = [*range(sample, first + count), *range(first, sample)]
        return next(i for i in ring if self.images[i].startswith(b"\xff\xd8"))


def assert_equal(a: Batch, b: Batch, *, crcs: bool) -> None:
    np.testing.assert_array_equal(a.ids, b.ids)
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.params, b.params)
    assert torch.equal(a.views, b.views)
    if crcs:
        np.testing.assert_array_equal(a.crcs, b.crcs)
    else:
        assert not a.crcs.any()


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.usefixtures("many_threads")
def test_batches_equal_the_plain_ones(packed: Index, threads: int, micro: int) -> None:
    order = Order(packed, SEED, 4, 16)  # 5 steps an epoch
    reference = Reference(order)
    with loading(order, threads=threads, micro=micro, audit=True) as loader:
        for step in range(11):
            batch = next(loader)
            assert_equal(batch, reference.batch(step, range(4), micro), crcs=True)
            # Autograd may keep them, although threads fill them in inference mode.
            assert not batch.views.is_inference()
            assert not batch.params.is_inference()


def test_a_thread_takes_small_pieces_together(packed: Index) -> None:
    order = Order(packed, SEED, 16, 32)  # two rows of each stream
    with loading(order, threads=1) as loader:
        plan = itertools.islice(loader._plan(), 4)
        chunks = [chunk for chunk in plan if isinstance(chunk, Chunk)]
    taken = [sum(len(piece.positions) for piece in chunk.pieces) for chunk in chunks]
    assert taken == [CHUNK, CHUNK, CHUNK, CHUNK]
    assert [chunk.last for chunk in chunks] == [False, True, False, True]


@pytest.mark.parametrize("most", [0, 20_000, 10**9])
def test_images_are_decoded_together_up_to_a_bound(
    packed: Index, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    waiting: list[int] = []  # the bytes of each image that is decoded and not cut
    held: list[int] = []  # their sum after each decoding
    sizes: list[int] = []

    def decode_one(self: BlockReader, block: Block, row: int) -> Tensor:
        image = decode_alone(self, block, row)
        sizes.append(image.numel())
        waiting.append(image.numel())
        held.append(sum(waiting))
        return image

    def cut(out: Tensor, image: Tensor, box: Box) -> None:
        crop_into(out, image, box)
        waiting.clear()

    decode_alone = BlockReader.decode
    monkeypatch.setattr("shards.decode.BYTES_AT_ONCE", most)
    monkeypatch.setattr(BlockReader, "decode", decode_one)
    monkeypatch.setattr("shards.loader.crop_into", cut)
    monkeypatch.setattr("shards.center_crops.crop_into", cut)
    order = Order(packed, SEED, 4, 16)
    reference = Reference(order)

    def check() -> None:
        assert max(held) <= most + max(sizes)
        assert (max(held) > max(sizes)) == (most > 0)
        held.clear()

    with loading(order, threads=0) as loader:
        for step in range(3):
            assert_equal(next(loader), reference.batch(step, range(4), 1), crcs=False)
    check()
    for _ in CropReader(16, 0.875, 1, 0.0, ignore).read(packed):
        pass
    check()


def test_any_start_step(packed: Index) -> None:
    order = Order(packed, SEED, 4, 16)
    reference = Reference(order)
    for start in (1, 4, 5, 13, 5_000_000):
        with loading(order, start=start) as loader:
            for step in range(start, start + 3):
                assert_equal(next(loader), reference.batch(step, range(4), 1), crcs=False)


def test_ranks_make_up_the_global_batch(packed: Index) -> None:
    order = Order(packed, SEED, 4, 16)
    reference = Reference(order)
    for world in (2, 3):
        seen: list[int] = []
        for rank in range(world):
            mine = rank_streams(4, rank, world)
            with loading(order, streams=mine, micro=2, start=3) as loader:
                batch = next(loader)
            assert_equal(batch, reference.batch(3, mine, 2), crcs=False)
            seen += batch.ids.tolist()
        assert sorted(seen) == sorted(reference.batch(3, range(4), 1).ids.tolist())


def test_sidecars_and_object_stores(
    packed: Index, pack_files: PackFiles, photos: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "INLINE_BLOCKS", 3)
    pack_files("memory://loader", photos)
    found = index_module.load("memory://loader", "data.train")
    assert found.shards[0].blocks is None
    reference = Reference(Order(packed, SEED, 4, 16))
    with loading(Order(found, SEED, 4, 16)) as loader:
        for step in range(7):
            assert_equal(next(loader), reference.batch(step, range(4), 1), crcs=False)


def test_a_store_that_does_not_answer_for_a_sidecar_is_one_line(
    pack_files: PackFiles, photos: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "INLINE_BLOCKS", 3)
    pack_files("memory://no-answer", photos)
    found = index_module.load("memory://no-answer", "data.train")
    place = f"memory://no-answer/{index_module.sidecar('shard-000001.tar')}"
    text, read = f"{place}: gave up after 8 tries", files.read

    def fail(url: str, *span: int) -> bytes:
        if url == place:
            raise OSError(text)
        return read(url, *span)

    monkeypatch.setattr(files, "read", fail)
    assert failure(Order(found, SEED, 4, 16)) == text
    with pytest.raises(InputError) as raised:
        list(CropReader(32, 0.875, 2, 0.0, ignore).read(found))
    assert str(raised.value) == text


def failure(order: Order, threads: int = 2) -> str:
    """The text of the InputError that the loader ends with, within 20 batches."""
    with loading(order, threads=threads) as loader:
        try:
            for _ in range(20):
                next(loader)
        except InputError as error:
            return str(error)
    raise AssertionError("no InputError")


def spoil(photos: Files, *names: str) -> Files:
    """With these photos replaced by what cannot be decoded."""
    return photos | dict.fromkeys(names, b"no image at all, but text")


BAD = ("ant/a3.jpg", "bee/b7.jpg", "cat/c20.jpg")


@pytest.mark.usefixtures("many_threads")
def test_bad_samples_are_replaced_named_once_and_counted(
    pack_files: PackFiles, photos: Files, tmp_path: Path
) -> None:
    cut = photos["cat/c20.jpg"][:300]
    files = spoil(photos, *BAD[:2]) | {"cat/c20.jpg": b"\0" + cut, "ant/a5.jpg": b""}
    found = pack_files(str(tmp_path / "bad"), files)
    order = Order(found, SEED, 4, 16)
    reference = Reference(order)
    messages: list[str] = []
    with loading(order, threads=4, audit=True, report=messages.append) as loader:
        for step in range(15):
            assert_equal(next(loader), reference.batch(step, range(4), 1), crcs=True)
        assert loader.faults.count == 4
    assert len(messages) == 4
    for name in ("a3", "b7", "c20", "a5"):
        (message,) = [m for m in messages if f"_{name}:" in m]
        assert "shard-0000" in message
        assert "\n" not in message


def test_a_replacement_wraps_in_file_order(
    pack_files: PackFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "BLOCK_BYTES", 1 << 20)
    files = {f"a/{i}.jpg": draw_photo(i, 16, 16) for i in range(6)}
    images = Reference(Order(pack_files(str(tmp_path / "a"), files), SEED, 1, 6)).images
    bad = {images[0], images[4], images[5]}
    files = {path: bytes(len(c)) if c in bad else c for path, c in files.items()}
    found = pack_files(str(tmp_path / "b"), files)
    assert len(found.blocks(0)) == 1
    with loading(Order(found, SEED, 1, 6)) as loader:
        assert sorted(next(loader).ids.tolist()) == [1, 1, 1, 1, 2, 3]


def test_a_truncated_jpeg_counts_as_bad(
    pack_files: PackFiles, photos: Files, tmp_path: Path
) -> None:
    files = photos | {"ant/a3.jpg": photos["ant/a3.jpg"][:200]}
    order = Order(pack_files(str(tmp_path / "cut"), files), SEED, 4, 16)
    with loading(order) as loader:
        ids = np.concatenate([next(loader).ids for _ in range(20)])
        assert loader.faults.count == 1
    assert len(set(ids.tolist())) == 89


@pytest.mark.usefixtures("many_threads")
def test_too_many_bad_samples(pack_files: PackFiles, photos: Files, tmp_path: Path) -> None:
    files = spoil(photos, *list(photos)[:12])
    order = Order(pack_files(str(tmp_path / "bad"), files), SEED, 4, 16)
    assert "11 samples were left out, more than data.corrupt allows (10)" in failure(
        order, threads=1
    )
    with loading(order, corrupt=0.5) as loader:
        for _ in range(20):
            next(loader)
        assert loader.faults.count == 12


def test_the_pixel_rules_reach_the_decoder(pack_files: PackFiles, tmp_path: Path) -> None:
    """A picture that is dark on the left lies on its side: upright, it is dark at the top."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "JPEG", exif=make_exif(6))
    found = pack_files(str(tmp_path), {f"a/{i}.jpg": buffer.getvalue() for i in range(16)})
    order = Order(found, SEED, 4, 8)
    whole = ViewsConfig(size=16, area=(1, 1), ratio=(1, 1))
    for config, dark in ((DataConfig(), (2, 0)), (DataConfig(exif="apply"), (1, 0))):
        with loading(order, config=config, views=whole) as loader:
            cropped = [
                next(loader).views[0, 0],
                next(CropReader(16, 1.0, 1, 0.0, ignore, rules=config.rules).read(found)).images[0],
            ]
        for image in cropped:
            means = image.float().mean(dim=[d for d in (0, 1, 2) if d != dark[0]])
            assert means[:6].max() < 20
            assert means[-6:].min() > 235
    with (
        loading(order, config=DataConfig(max_pixels=1023)) as loader,
        pytest.raises(InputError) as caught,
    ):
        next(loader)
    assert "32 x 32 pixels, more than data.max_pixels (1,023): raise it, or pack" in str(
        caught.value
    )
    small = CropReader(16, 1.0, 1, 0.5, ignore, rules=PixelRules(max_pixels=1023))
    with pytest.raises(InputError, match=r"more than data.max_pixels \(1,023\)"):
        list(small.read(found))


def test_a_block_without_any_good_sample(pack_files: PackFiles, tmp_path: Path) -> None:
    found = pack_files(str(tmp_path / "bad"), {f"a/{i}.jpg": b"text" for i in range(4)})
    with (
        loading(Order(found, SEED, 1, 4)) as loader,
        pytest.raises(
            InputError, match=r"none of the 4 samples of a block can be decoded, .*: restore"
        ),
    ):
        next(loader)


@pytest.mark.usefixtures("many_threads")
def test_damaged_shards_are_named(packed: Index) -> None:
    order = Order(packed, SEED, 4, 16)
    path = Path(packed.shard_url(2))
    whole = path.read_bytes()

    path.write_bytes(whole[:20_000])
    assert "shard-000002.tar: bytes" in failure(order)
    assert "truncated" in failure(order)

    broken = bytearray(whole)
    broken[int(packed.blocks(2)[1, 0])] ^= 0x55
    path.write_bytes(bytes(broken))
    assert "shard-000002.tar: bytes" in failure(order)
    assert "not the tar that the index describes" in failure(order)

    path.unlink()
    assert failure(order).endswith("shard-000002.tar: the shard is missing: restore it")


def test_an_index_that_disagrees_with_its_shard(packed: Index) -> None:
    blocks = packed.blocks(1)
    blocks[0, 1] += 1
    blocks[1, 1] -= 1
    text = failure(Order(packed, SEED, 4, 16))
    assert "shard-000001.tar" in text
    assert "the index says" in text


def live_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.is_alive()}


@pytest.mark.parametrize("taken", [0, 1, 7])
@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.usefixtures("many_threads")
def test_close_ends_all_threads(packed: Index, taken: int, threads: int) -> None:
    before = live_threads()
    with loading(Order(packed, SEED, 4, 16), threads=threads) as loader:
        for _ in range(taken):
            next(loader)
    deadline = time.monotonic() + 10
    while live_threads() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert live_threads() - before == set()
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("threads", [0, 2])
def test_threads_end_after_an_error(pack_files: PackFiles, tmp_path: Path, threads: int) -> None:
    before = live_threads()
    found = pack_files(str(tmp_path / "bad"), {f"a/{i}.jpg": b"text" for i in range(4)})
    failure(Order(found, SEED, 1, 4), threads)
    deadline = time.monotonic() + 10
    while live_threads() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert live_threads() - before == set()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "CMYK", "1"])
def test_images_of_other_modes(pack_files: PackFiles, tmp_path: Path, mode: str) -> None:
    picture: PillowImage.Image = PillowImage.open(io.BytesIO(draw_photo(0, 40, 40)))
    if mode == "I;16":
        gray = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        picture = PillowImage.fromarray(gray)
    else:
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    name = "a/x.jpg" if mode == "CMYK" else "a/x.png"
    found = pack_files(str(tmp_path / "one"), {name: buffer.getvalue()})
    with loading(Order(found, SEED, 1, 1)) as loader:
        batch = next(loader)
        assert loader.faults.count == 0
    assert batch.views.dtype == torch.uint8
    assert batch.views.float().std() > 5


# Evaluation


@pytest.mark.usefixtures("many_threads")
def test_evaluation_sees_every_sample_once(packed: Index) -> None:
    reference = Reference(Order(packed, SEED, 1, 1))
    crops = CropReader(size=20, fraction=0.875, threads=2, corrupt=0.01, report=ignore)
    batches = list(crops.read(packed))
    images = torch.cat([batch.images for batch in batches])
    assert images.shape == (90, 3, 20, 20)
    assert torch.cat([batch.labels for batch in batches]).tolist() == reference.labels
    for sample in (0, 17, 89):
        content = reference.images[sample]
        image = decode(bytearray(content), 0, len(content))
        side = int(0.875 * min(image.shape[1:]))
        box = center_box(image.shape[1], image.shape[2], 0.875)
        assert box[2:] == (side, side)
        for at, whole in zip(box[:2], image.shape[1:], strict=True):
            assert abs(2 * at + side - whole) <= 1
        assert torch.equal(images[sample], crop_resize(image, box, 20))


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.usefixtures("many_threads")
def test_threads_of_an_evaluation_end_when_it_is_left(packed: Index, threads: int) -> None:
    before = live_threads()
    batches = CropReader(8, 1.0, threads, 0.01, ignore).read(packed)
    next(batches)
    assert live_threads() - before
    batches.close()
    deadline = time.monotonic() + 10
    while live_threads() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert live_threads() - before == set()


def test_evaluation_of_a_part(packed: Index) -> None:
    crops = CropReader(size=8, fraction=1.0, threads=1, corrupt=0.01, report=ignore)
    some = list(crops.read(packed, limit=30))
    count = sum(len(batch.labels) for batch in some)
    assert 20 <= count <= 40


def test_a_later_evaluation_of_a_part_reads_the_sidecars_of_that_part(
    packed: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large set, not all sidecars stay in memory, and there are thousands of them."""
    monkeypatch.setattr(index_module, "INLINE_BLOCKS", 3)
    monkeypatch.setattr(index_module, "KEPT_SIDECARS", 1)
    packed.save()
    found = index_module.load(packed.url, "data.train")
    sidecars, read = list[bool](), files.read

    def note(url: str, *span: int) -> bytes:
        sidecars.append(url.endswith(".blocks.json"))
        return read(url, *span)

    monkeypatch.setattr(files, "read", note)
    wanted = []
    for most in (len(found.shards) + 1, 1):
        sidecars.clear()
        batches = CropReader(8, 0.875, 1, 0.0, ignore).read(found, limit=5)
        wanted.append([number for batch in batches for number in batch.ids.tolist()])
        assert sum(sidecars) <= most
    assert wanted[0] == wanted[1]


@pytest.mark.usefixtures("many_threads")
def test_evaluation_leaves_bad_samples_out(
    pack_files: PackFiles, photos: Files, tmp_path: Path
) -> None:
    found = pack_files(str(tmp_path / "bad"), spoil(photos, *BAD))
    messages: list[str] = []
    options = {"size": 8, "fraction": 1.0, "threads": 2, "corrupt": 0.01}
    batches = list(CropReader(report=messages.append, **options).read(found))  # type: ignore[arg-type]
    assert sum(len(batch.images) for batch in batches) == 87
    assert len(messages) == 3
    Path(found.shard_url(1)).unlink()
    with pytest.raises(InputError, match=r"shard-000001\.tar: the shard is missing"):
        list(CropReader(report=ignore, **options).read(found))  # type: ignore[arg-type]


def test_memory_is_stated(packed: Index, pack_files: PackFiles, tmp_path: Path) -> None:
    with loading(Order(packed, SEED, 4, 16)) as loader:
        assert 4 * 2 * 8_000 < loader.assignment.block_memory < 4 * 2 * 24_000
    one = pack_files(str(tmp_path / "one"), {"a/0.jpg": draw_photo(0, 8, 8)})  # a single block
    with loading(Order(one, SEED, 1, 1)) as loader:
        assert loader.assignment.block_memory == 2 * one.shards[0].bytes
    empty = replace(one.shards[0], samples=0, blocks=np.empty((0, 2), np.int64))
    with loading(Order(replace(one, shards=[empty, *one.shards]), SEED, 1, 1)) as loader:
        assert loader.assignment.block_memory == 2 * one.shards[0].bytes
