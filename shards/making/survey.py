"""Look for images of more than 8 bits before packing, and find the window that they need."""

import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.making.bit_depth import MAY_BE_WIDE, find_bit_depth
from shards.making.pack import Image
from shards.making.pictures import picture_size, read_wide
from shards.making.turns import take_turn
from shards.making.window import Window, explain_window, find_range
from shards.png import undo_scaling
from shards.threads import run_in_threads

LOOKED_AT = 100_000  # The headers of so many images are read, which takes 10 s on a local disk.
MEASURED = 64  # The values of so many images are looked at.
_VALUES = 100_000  # So many values of each are kept for percentiles.


class ReadImage(Protocol):
    """Reads the content of an image, or the bytes [start, stop) of it."""

    def __call__(
        self, image: Image, start: int | None = None, stop: int | None = None
    ) -> bytes: ...


class _Measured(NamedTuple):
    low: float
    high: float
    scaled: bool  # True for an 8-bit image whose values were scaled up
    values: NDArray[np.float64]  # [n] evenly spaced values


def choose_window(
    images: Iterable[Image],
    read: ReadImage,
    percentiles: tuple[float, float] | None,
    *,
    place: str,
    most: int,
    threads: int,
) -> Window | None:
    """Return the window for the images of more than 8 bits. Return None when they need none.

    Of up to LOOKED_AT images whose extension allows more than 8 bits, the header is read. Of up to
    MEASURED of those with more bits, the values are read. They are evenly spaced by name.

    Raises InputError when a window is needed and no percentiles are given.

    Args:
        percentiles: The percentiles of the values that become 0 and 255.
        place: The source, for messages.
        most: The most pixels that an image may have.
    """
    candidates = sorted(i for i in images if i.path.rpartition(".")[2].lower() in MAY_BE_WIDE)
    wide = _find_wide(_space(candidates, LOOKED_AT), read, threads)
    chosen = _space(wide, MEASURED)
    found = [
        one for one in run_in_threads(lambda i: _measure(i, read, most), chosen, threads) if one
    ]
    if not found or (percentiles is None and all(one.scaled for one in found)):
        return None
    low, high = min(one.low for one in found), max(one.high for one in found)
    which = "its images" if len(candidates) <= LOOKED_AT else f"{LOOKED_AT:,} of its images"
    number, example = f"{len(wide):,} of {which}", wide[0].path
    if percentiles is None:
        seen = "" if len(found) == len(wide) else f" (in {len(found)} of them)"
        raise InputError(
            f"SOURCE {place}: {number}{seen}, such as {example}, have {explain_window(low, high)}"
        )
    values = np.concatenate([one.values for one in found])
    low, high = np.percentile(values, percentiles).tolist() if len(values) else (0.0, 0.0)
    if low >= high:
        raise InputError(
            f"--window-percentiles: both are the value {low:g} in {number}, such as {example}: "
            "choose others, or give --window LOW HIGH"
        )
    return low, high


def _space(images: list[Image], most: int) -> list[Image]:
    """Return at most that many images, evenly spaced."""
    count = min(len(images), most)
    return [images[i * len(images) // count] for i in range(count)]


def _find_wide(images: list[Image], read: ReadImage, threads: int) -> list[Image]:
    """Return the images whose headers announce more than 8 bits per channel."""

    def depth_of(image: Image) -> int:
        def part(start: int, stop: int) -> bytes:
            stop = min(stop, image.size)
            return read(image, start, stop) if start < stop else b""

        return find_bit_depth(part)

    depths = run_in_threads(depth_of, images, 4 * threads)
    return [image for image, depth in zip(images, depths, strict=True) if depth > 8]


def _measure(image: Image, read: ReadImage, most: int) -> _Measured | None:
    """Measure an image. Return None for a damaged one, which packing reports."""
    content, suffix = read(image, 0, image.size), image.path.rpartition(".")[2].lower()

    def measure() -> _Measured:
        values = read_wide(content, suffix, most).values
        low, high = find_range(values)
        scaled = undo_scaling(values) is not None
        some = values.reshape(-1)[:: max(1, values.size // _VALUES)].astype(np.float64)
        return _Measured(low, high, scaled, some[np.isfinite(some)])

    try:
        return take_turn(math.prod(picture_size(content, suffix, most)), measure)
    except Exception:  # Pillow raises many kinds for damaged images.
        return None
