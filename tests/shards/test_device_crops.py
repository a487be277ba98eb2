"""Decoding on a GPU: what it takes, what it leaves to the CPU, and that the crops are the CPU's.

The decoder itself is replaced by the CPU's. tests/whole/test_gpu.py has a real one.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PillowImage
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from shards import device_crops
from shards.decode import crop_resize
from shards.device_crops import check_device, resize_on_device
from shards.errors import InputError
from shards.jpeg_kind import suits_gpu
from shards.loader import Assignment, Batch, DataConfig, TrainLoader
from shards.order import Order
from shards.orientation import make_exif
from shards.views import ViewsConfig
from tests.conftest import Files, PackFiles, draw_photo

HOST = torch.device("cpu")
VIEWS = ViewsConfig(size=16)
LEVELS = 2  # The CPU's kernel has weights of 16 bits, and rounds twice.


def encode(form: str = "JPEG", mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    """A smooth picture of 40 x 30 pixels."""
    picture = PillowImage.open(io.BytesIO(draw_photo(seed, 40, 30, "PNG"))).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


# Crops -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(90, 70, 32), (20, 31, 48), (300, 200, 32), (7, 5, 16), (1, 9, 8), (1, 1, 8), (32, 32, 32)],
)
def test_crops_are_those_of_the_cpu_on_noise(height: int, width: int, size: int) -> None:
    """Noise is the worst case. One pass without rounding in between is far off there."""
    generator = torch.Generator().manual_seed(height)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    boxes = [(0, 0, height, width), (height // 3, width // 4, height - height // 3, width // 2 + 1)]
    for top, left, tall, wide in boxes:
        box = (top, left, tall, min(wide, width - left))
        ours, cpus = resize_on_device(image, box, size), crop_resize(image, box, size)
        assert (ours.dtype, ours.shape) == (torch.uint8, cpus.shape)
        off = (ours.int() - cpus.int()).abs()
        assert off.max() <= LEVELS
        assert (off > 0).float().mean() < 0.02


def test_one_pass_would_not_do() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8, generator=generator)
    plain = F.interpolate(image[None].float(), (32, 32), mode="bicubic")[0].round().clamp(0, 255)
    assert (plain.int() - crop_resize(image, (0, 0, 90, 70), 32).int()).abs().max() > 10


# Which images ------------------------------------------------------------------------------

ARITHMETIC = bytearray(encode())
ARITHMETIC[ARITHMETIC.index(b"\xff\xc0") + 1] = 0xC9
TWELVE_BITS = bytearray(encode())
TWELVE_BITS[TWELVE_BITS.index(b"\xff\xc0") + 4] = 12
FLAT = bytearray(encode())
FLAT[FLAT.index(b"\xff\xc0") + 5 : FLAT.index(b"\xff\xc0") + 7] = b"\0\0"

SUITED = {
    "baseline": encode(),
    "full color": encode(subsampling=0),
    "progressive": encode(progressive=True),
    "gray": encode(mode="L"),
    "with EXIF": encode(exif=make_exif(6)),
    "with a comment that looks like a header": encode(comment=b"\xff\xc0\0\x11\x0c" + b"\xff" * 30),
    "with a thumbnail": encode(exif=make_exif(1) + encode(mode="CMYK")),
    "filled up": encode().replace(b"\xff\xc0", b"\xff\xff\xff\xc0", 1),
}
UNSUITED = {
    "PNG": encode("PNG"),
    "WebP": encode("WEBP"),
    "GIF": encode("GIF"),
    "CMYK": encode(mode="CMYK"),
    "stored as RGB": encode(keep_rgb=True),
    "arithmetic code": bytes(ARITHMETIC),
    "12 bits": bytes(TWELVE_BITS),
    "no rows": bytes(FLAT),
    "cut short": encode()[:-30],
    "without its end": encode()[:-2],
    "bytes behind its end": encode() + b"\0",
    "a head alone": encode()[:40] + b"\xff\xd9",
    "a frame cut short": encode()[: encode().index(b"\xff\xc0") + 8] + b"\xff\xd9",
    "text": b"no image",
    "nothing": b"",
}


@pytest.mark.parametrize("name", SUITED)
def test_a_gpu_takes(name: str) -> None:
    content = memoryview(SUITED[name])
    assert suits_gpu(content, 40 * 30)
    assert not suits_gpu(content, 40 * 30 - 1)


@pytest.mark.parametrize("name", UNSUITED)
def test_a_gpu_does_not_take(name: str) -> None:
    assert not suits_gpu(memoryview(UNSUITED[name]), 1 << 30)


# The loader --------------------------------------------------------------------------------


class Decoder:
    """Stands in for the GPU's: it inverts pixels, so that its images are known by their looks."""

    def __init__(self, invert: bool = False, fails: bytes = b"\0") -> None:
        self.invert, self.fails = invert, fails
        self.calls: list[list[bytes]] = []

    def __call__(self, encoded: list[Tensor], device: torch.device) -> list[Tensor]:
        assert device == HOST
        contents = [e.numpy().tobytes() for e in encoded]
        self.calls.append(contents)
        if self.fails in contents:
            raise RuntimeError("Failed to decode jpeg stream: 8")
        images: list[Tensor] = decode_jpeg(encoded, ImageReadMode.RGB)
        return [255 - image for image in images] if self.invert else images

    @property
    def taken(self) -> set[bytes]:
        return {content for call in self.calls for content in call}


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    found = Decoder()
    monkeypatch.setattr(device_crops, "decode_on_device", found)
    return found


def batches(order: Order, config: DataConfig, report: Any = print, **options: Any) -> list[Batch]:
    """The batches of four epochs, in which every image occurs."""
    device = options.pop("device", HOST)
    assigned: dict[str, Any] = {"views": VIEWS, "config": config, "threads": 3} | options
    loader = TrainLoader(Assignment(order, range(order.streams), **assigned), report, device=device)
    with closing(loader):
        return [next(loader) for _ in range(order.steps_per_epoch * 4)]


def both(order: Order, report: Any = print, **fields: Any) -> Iterator[tuple[Batch, Batch]]:
    """The batches of the GPU's way beside those of the CPU's."""
    for ours, cpus in zip(
        batches(order, DataConfig(decode="gpu", **fields), report),
        batches(order, DataConfig(**fields), lambda _: None),
        strict=True,
    ):
        np.testing.assert_array_equal(ours.ids, cpus.ids)
        assert torch.equal(ours.labels, cpus.labels)
        assert torch.equal(ours.params, cpus.params)
        assert (ours.views.int() - cpus.views.int()).abs().max() <= LEVELS
        assert ours.views.is_contiguous() == cpus.views.is_contiguous()
        yield ours, cpus


def test_batches_are_those_of_the_cpu(
    pack_files: PackFiles, photos: Files, tmp_path: Path, decoder: Decoder
) -> None:
    order = Order(pack_files(str(tmp_path), photos), 11, 4, 16)
    told: list[str] = []
    for ours, cpus in both(order, told.append, audit=True):
        assert (ours.crcs > 0).all()
        same = [n for n in range(16) if torch.equal(ours.views[:, n], cpus.views[:, n])]
        np.testing.assert_array_equal(ours.crcs[same], cpus.crcs[same])
    assert decoder.taken == set(photos.values())
    assert told == []


@pytest.mark.parametrize("options", [{"threads": 1}, {"micro": 2}, {"threads": 5}])
def test_no_neighbor_changes_an_image(
    pack_files: PackFiles,
    photos: Files,
    tmp_path: Path,
    options: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also beside one that spoils the calls it is in."""
    bad = photos["cat/c20.jpg"]
    order = Order(pack_files(str(tmp_path), photos), 11, 4, 16)
    monkeypatch.setattr(device_crops, "decode_on_device", Decoder(invert=True, fails=bad))
    config = DataConfig(decode="gpu")
    seen: dict[tuple[int, int], Tensor] = {}
    for changes in ({"threads": 3}, options):
        for step, batch in enumerate(batches(order, config, lambda _: None, **changes)):
            for n, sample in enumerate(batch.ids.tolist()):
                known = seen.setdefault((step, sample), batch.views[:, n])
                assert torch.equal(known, batch.views[:, n])


def test_the_cpu_decodes_what_the_gpu_cannot(
    pack_files: PackFiles, photos: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = {"ant/a1.png": UNSUITED["PNG"], "ant/a2.webp": UNSUITED["WebP"]}
    odd |= {f"bee/x{n}.jpg": UNSUITED[k] for n, k in enumerate(("CMYK", "stored as RGB"))}
    refused = photos["cat/c20.jpg"]
    order = Order(pack_files(str(tmp_path), photos | odd), 11, 4, 16)
    inverting = Decoder(invert=True, fails=refused)
    monkeypatch.setattr(device_crops, "decode_on_device", inverting)
    told: list[str] = []
    inverted: set[int] = set()
    plain: set[int] = set()
    for ours, cpus in zip(
        batches(order, DataConfig(decode="gpu"), told.append),
        batches(order, DataConfig(), lambda _: None),
        strict=True,
    ):
        for n, sample in enumerate(ours.ids.tolist()):
            off = (ours.views[:, n].int() - cpus.views[:, n].int()).abs().max()
            (plain if off == 0 else inverted).add(sample)
    assert len(plain) == len(odd) + 1  # the odd ones and the refused one, and no other
    assert len(inverted) == len(photos) - 1
    assert inverting.taken == set(photos.values())
    (message,) = told
    assert "the CPU decodes this image, and others that are no JPEGs of 8 bits" in message


def test_bad_images_are_replaced_as_ever(
    pack_files: PackFiles, photos: Files, tmp_path: Path, decoder: Decoder
) -> None:
    names = ("ant/a3.jpg", "bee/b7.jpg", "cat/c20.jpg")
    bad = dict(zip(names, (b"text", photos[names[1]][:300], b""), strict=True))
    order = Order(pack_files(str(tmp_path), photos | bad), 11, 4, 16)
    told: list[str] = []
    for _ in both(order, told.append):
        pass
    assert sorted("; not used" in message for message in told) == [True, True, True]
    assert not decoder.taken & set(bad.values())


def test_the_pixel_rules_hold(
    pack_files: PackFiles, photos: Files, tmp_path: Path, decoder: Decoder
) -> None:
    turned = {f"ant/t{n}.jpg": encode(seed=n, exif=make_exif(1 + n)) for n in range(8)}
    order = Order(pack_files(str(tmp_path), photos | turned), 11, 4, 16)
    ignored, applied = (
        torch.cat([ours.views for ours, _ in both(order, exif=exif)])
        for exif in ("ignore", "apply")
    )
    assert not torch.equal(ignored, applied)
    decoder.calls.clear()
    small = [path for path, content in photos.items() if _pixels(content) <= 3024]
    for _ in both(order, max_pixels=3024, corrupt=1.0):
        pass
    assert decoder.taken == {photos[path] for path in small} | set(turned.values())
    assert len(small) < len(photos)


def _pixels(content: bytes) -> int:
    width, height = PillowImage.open(io.BytesIO(content)).size
    return width * height


def test_a_thread_holds_a_bounded_number_of_pixels(
    pack_files: PackFiles,
    photos: Files,
    tmp_path: Path,
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_crops, "MOST_AT_ONCE", 6100)
    order = Order(pack_files(str(tmp_path), photos), 11, 1, 16)
    for _ in both(order):
        pass
    held = [sum(map(_pixels, call)) for call in decoder.calls]
    assert max(held) <= 6100
    assert max(map(len, decoder.calls)) > 1
    monkeypatch.setattr(device_crops, "MOST_AT_ONCE", 3024)
    decoder.calls.clear()
    for _ in both(order):
        pass
    assert decoder.taken == {c for c in photos.values() if _pixels(c) <= 3024}


def test_a_full_gpu_is_no_bad_image(
    pack_files: PackFiles, photos: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: list[Tensor], __: torch.device) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_crops, "decode_on_device", full)
    order = Order(pack_files(str(tmp_path), photos), 11, 4, 16)
    with pytest.raises(torch.OutOfMemoryError):
        batches(order, DataConfig(decode="gpu"))


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("Error while decoding JPEG images: CUDA out of memory. Tried to allocate 2.00 MiB.", True),
        ("Error while decoding JPEG images: Failed to decode batch: 5\nException raised", True),
        ("Error while decoding JPEG images: Failed to synchronize CUDA stream: 2", True),
        ("Error while decoding JPEG images: Failed to decode jpeg stream: 8", False),
        ("Error while decoding JPEG images: Failed to parse jpeg stream: 3", False),
    ],
)
def test_torchvision_tells_a_full_gpu_by_its_text_alone(
    text: str, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the CPU would decode the image, and pixels would depend on free memory."""

    def fails(*_: Any, **__: Any) -> list[Tensor]:
        raise RuntimeError(text)

    monkeypatch.setattr(device_crops, "decode_jpeg", fails)
    with pytest.raises(RuntimeError) as caught:
        device_crops.decode_on_device([], HOST)
    assert isinstance(caught.value, torch.OutOfMemoryError) == full


class Stream:
    """Stands in for a stream of a GPU."""

    def __init__(self, _: torch.device) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, _: "Stream") -> None: ...


def test_each_thread_works_on_its_process_own_gpu(
    pack_files: PackFiles, photos: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads begin on the machine's first GPU, whatever the process has set."""
    second, chosen = torch.device("cuda", 1), dict[int, torch.device]()
    decoded_on = list[torch.device | None]()

    def set_device(device: torch.device) -> None:
        chosen[threading.get_ident()] = device

    def decode(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
        assert device == second
        decoded_on.append(chosen.get(threading.get_ident()))
        images: list[Tensor] = decode_jpeg(encoded, ImageReadMode.RGB)
        return images

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(device_crops, "decode_on_device", decode)
    order = Order(pack_files(str(tmp_path), photos), 11, 4, 16)
    batches(order, DataConfig(decode="gpu"), device=second)
    assert decoded_on
    assert set(decoded_on) == {second}


# The device --------------------------------------------------------------------------------


def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(InputError, match=r"needs a CUDA GPU, .*: give --data.decode cpu"):
        check_device(HOST)


def test_a_torchvision_without_the_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: list[Tensor], __: torch.device) -> list[Tensor]:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nat x")

    monkeypatch.setattr(device_crops, "decode_on_device", missing)
    with pytest.raises(InputError) as caught:
        check_device(torch.device("cuda", 0))
    assert "torchvision cannot decode JPEGs on cuda:0 (decode_jpegs_cuda: torchvision not" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert "give --data.decode cpu" in str(caught.value)


def test_a_device_that_decodes_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Tensor] = []

    def works(encoded: list[Tensor], _: torch.device) -> list[Tensor]:
        decoded.extend(decode_jpeg(encoded, ImageReadMode.RGB))
        return decoded

    monkeypatch.setattr(device_crops, "decode_on_device", works)
    check_device(torch.device("cuda", 0))
    assert [image.shape for image in decoded] == [(3, 16, 16)]
