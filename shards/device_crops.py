"""Decode JPEGs and cut their crops on a GPU, in the threads of the loader.

The crops go back to host memory as uint8. So a batch looks the same whoever decoded it, and no
stream of the training waits for a decoder.
"""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from shards.decode import Box, PixelRules
from shards.dimensions import image_size
from shards.errors import InputError
from shards.jpeg_kind import suits_gpu
from shards.orientation import image_orientation, turn
from shards.samples import Block
from shards.views import ViewsConfig, crop_box

# The CPU decodes larger images, and a thread decodes about as many pixels at a time. This bounds
# the memory that a thread takes of the GPU to about 300 MB.
MOST_AT_ONCE = 1 << 24
THREADS = 4  # More of them hinder each other: 16 made two thirds of what 4 made, on an H100.

# What torch, nvJPEG (by NVJPEG_STATUS_ALLOCATOR_FAILURE, 5) and CUDA (by 2) say of a full GPU.
_FULL = re.compile(r"CUDA out of memory[^\n]*|Failed to [\w ]+: 5\b|CUDA stream: 2\b")


def decode_on_device(encoded: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode whole JPEGs in host memory to uint8 RGB [3, H, W] on a GPU.

    Raises RuntimeError, without any result, when one of them cannot be decoded there, and
    OutOfMemoryError when the GPU's memory is full.
    """
    try:
        decoded: list[Tensor] = decode_jpeg(encoded, ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        # torchvision raises all errors as plain RuntimeErrors, those of torch's allocator too.
        if told := _FULL.search(str(error)):
            raise torch.OutOfMemoryError(f"CUDA error: out of memory ({told[0]})") from None
        raise
    return decoded


def check_device(device: torch.device) -> None:
    """Raise InputError unless JPEGs can be decoded on the device. One is tried."""
    if device.type != "cuda":
        raise InputError(
            "data.decode gpu needs a CUDA GPU, and this process has none: give --data.decode cpu"
        )
    try:
        decode_on_device([encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))], device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"data.decode gpu: torchvision cannot decode JPEGs on {device} ({reason}): install a "
            "torchvision that has nvJPEG, or give --data.decode cpu"
        ) from None


class DeviceCrops:
    """Cuts the views of the images that the device decodes, and leaves the others to the CPU.

    torchvision's decoder writes to new memory at once, even if kernels that wait in the caller's
    stream still read what lay there before (https://github.com/pytorch/vision/pull/9606). So it is
    called under a stream of its own, in which nothing ever waits. The images are cropped in a
    second stream, and are dropped only when that one is done with them.
    """

    def __init__(
        self,
        device: torch.device,
        rules: PixelRules,
        views: ViewsConfig,
        report: Callable[[str], None],
    ) -> None:
        """Make the two streams. `report` takes one line when the CPU has to decode an image."""
        self.device, self.rules, self.views, self._report = device, rules, views, report
        cuda = device.type == "cuda"
        self._decoding = torch.cuda.Stream(device) if cuda else None
        self._cropping = torch.cuda.Stream(device) if cuda else None
        self._told, self._lock = False, threading.Lock()

    def cut(
        self, block: Block, rows: Sequence[int], crops: NDArray[np.float64], out: Tensor
    ) -> set[int]:
        """Fill the rows of `out` whose images the device decodes; return these rows.

        Args:
            rows: [n] Positions of the images in the block.
            crops: [V, n, 4] Uniforms for `crop_box`.
            out: [V, n, 3, S, S] uint8 in host memory, channels last.
        """
        if self.device.type == "cuda":
            # Every thread begins on the first GPU. To leave a stream's context it would return
            # there, and each process would take memory of that GPU for a context of its own.
            torch.cuda.set_device(self.device)
        most = min(MOST_AT_ONCE, self.rules.max_pixels)
        contents = [_content(block, row) for row in rows]
        fitting = [i for i, content in enumerate(contents) if suits_gpu(content, most)]
        done: set[int] = set()
        for group in _share_out(fitting, contents):
            images = self._decode([contents[i] for i in group])
            try:
                with _under(self._cropping):
                    if self._cropping is not None and self._decoding is not None:
                        self._cropping.wait_stream(self._decoding)
                    for i, image in zip(group, images, strict=True):
                        if image is not None:
                            self._crop(image, contents[i], crops[:, i], out[:, i])
                            done.add(i)
            finally:
                if self._cropping is not None:
                    self._cropping.synchronize()
        return done

    def tell(self, name: str) -> None:
        """Report, once, that the CPU decodes an image."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            self._report(
                f"{name}: the CPU decodes this image, and others that are no JPEGs of 8 bits, gray "
                "or YCbCr, that the GPU can decode"
            )

    def _decode(self, contents: list[memoryview]) -> list[Tensor | None]:
        """Decode images; those that the device cannot decode become None.

        One bad image spoils a call. So they are then decoded one by one, because what becomes of
        an image must not depend on its neighbors.
        """
        encoded = [torch.frombuffer(content, dtype=torch.uint8) for content in contents]
        with _under(self._decoding):
            try:
                return [*decode_on_device(encoded, self.device)]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if len(contents) == 1:
                    return [None]
        return [image for content in contents for image in self._decode([content])]

    def _crop(
        self, image: Tensor, content: memoryview, crops: NDArray[np.float64], out: Tensor
    ) -> None:
        """Cut the views of one image [3, H, W] into `out` [V, 3, S, S], as the CPU does."""
        if self.rules.exif == "apply":
            image = turn(image, image_orientation(content))
        cuts = []
        for uniforms in crops:
            box = crop_box(uniforms, image.shape[1], image.shape[2], self.views)
            cuts.append(resize_on_device(image, box, self.views.size))
        pixels = torch.stack(cuts).permute(0, 2, 3, 1).contiguous()  # [V, S, S, 3]
        for view, cut in zip(out, pixels, strict=True):
            view.permute(1, 2, 0).copy_(cut, non_blocking=True)


def resize_on_device(image: Tensor, box: Box, size: int) -> Tensor:
    """Cut one box out of `image` [3, H, W] and resize it to [3, size, size], both uint8.

    `shards.decode.crop_resize` is the same on a CPU. Its kernel resizes rows first, rounds to uint8
    and then resizes columns. CUDA has no such kernel, and one pass over both in float32 differs by
    up to 35 of 255 levels at hard edges. Two passes with the same rounding differ by at most 2.
    """
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width].float()
    for shape in ((height, size), (size, size)):
        crop = F.interpolate(crop, shape, mode="bicubic", align_corners=False)
        crop = crop.round_().clamp_(0, 255)
    return crop[0].to(torch.uint8)


def _content(block: Block, row: int) -> memoryview:
    span = block.samples[row].image
    assert span is not None  # A Block keeps only samples with an image.
    return memoryview(block.content)[span[0] : span[0] + span[1]]


def _share_out(positions: list[int], contents: list[memoryview]) -> Iterator[list[int]]:
    """Yield the positions in groups whose images have at most MOST_AT_ONCE pixels together."""
    group: list[int] = []
    held = 0
    for i in positions:
        width, height = image_size(contents[i]) or (0, 0)
        if group and held + width * height > MOST_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(i)
        held += width * height
    if group:
        yield group


def _under(stream: torch.cuda.Stream | None) -> torch.cuda.StreamContext | nullcontext[None]:
    """Return a context in which `stream` is the current one, if there is any."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)
