"""Draw a small labeled image set for the quickstart and the tests.

The classes are eight gray textures that differ in structure. Each image has a random angle, phase,
scale, contrast, brightness and noise. So the pixels say little about the class, and the features
that BYOL learns say more.
"""

import numpy as np
from numpy.typing import NDArray

from shards.index import Index
from shards.making import pack
from shards.philox import Domain, uniform
from shards.philox import draw as draw_words
from shards.png import encode_png

CLASSES = ("stripes", "checks", "grid", "rings", "waves", "zigzag", "dots", "noise")

_WAVES = 16  # This many plane waves add up to one image of band noise.
_PIXELS = 1 << 16  # From here on, values of `minor` are for the noise of single pixels.
_AT_A_TIME = 512  # Only this many images are drawn together, to bound the memory.
_SHARD_BYTES = 4_000_000

Floats = NDArray[np.float64]


def draw(
    seed: int, ids: NDArray[np.int64], size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw images [N, size, size, 3] and return them with their labels [N].

    Each is a pure function of the seed and its id.

    Args:
        ids: [N] Sample ids.
        size: Side of an image, in pixels.
    """
    images = np.empty((len(ids), size, size, 3), np.uint8)
    for start in range(0, len(ids), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        images[part] = _draw_part(seed, ids[part], size)[..., None]
    return images, ids % len(CLASSES)


def write(url: str, samples: int, size: int, seed: int) -> Index:
    """Draw the images 0 to `samples` - 1 and pack them to `url` as PNG.

    Raises InputError when `url` holds other shards.
    """
    images, labels = draw(seed, np.arange(samples), size)
    contents = {}
    entries = []
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = f"{CLASSES[label]}/{CLASSES[label]}{i}.png"
        contents[path] = encode_png(image[..., 0])
        entries.append(pack.Image(path, len(contents[path]), label))
    images_set = pack.ImageSet("", entries, list(CLASSES))
    plan = pack.plan_shards(images_set, _SHARD_BYTES, seed)
    index, _ = pack.write_shards(plan, url, lambda image: contents[image.path], threads=1)
    return index


def _draw_part(seed: int, ids: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """Draw gray images [N, size, size]."""
    u = uniform(np.stack([draw_words(seed, Domain.SYNTHETIC, ids, minor=m) for m in range(4)]))
    angle = 2 * np.pi * u[0, :, 0]
    period = size * (0.16 + 0.16 * u[0, :, 1])  # pixels
    contrast = 0.15 + 0.30 * u[0, :, 2]
    brightness = 0.5 + 0.3 * (u[0, :, 3] - 0.5)
    noise = 0.02 + 0.10 * u[1, :, 0]
    sign = np.where(u[1, :, 1] < 0.5, -1.0, 1.0)

    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    cos, sin, scale = (_grid(v) for v in (np.cos(angle), np.sin(angle), period))
    across = (cos * x + sin * y) / scale + _grid(u[2, :, 0])  # in periods
    along = (cos * y - sin * x) / scale + _grid(u[2, :, 1])
    center = size * 0.7 * (u[2, :, 2:] - 0.5)
    radius = np.hypot(x - _grid(center[:, 0]), y - _grid(center[:, 1])) / scale

    labels = ids % len(CLASSES)
    pattern = np.empty(across.shape)
    for label, name in enumerate(CLASSES):
        of = labels == label
        if name == "noise":
            pattern[of] = _band_noise(seed, ids[of], x, y, period[of])
        else:
            pattern[of] = _texture(name, across[of], along[of], radius[of] + _grid(u[3, of, 0]))
    gray = _grid(brightness) + _grid(contrast * sign) * pattern
    gray += _grid(noise) * _pixel_noise(seed, ids, size)
    return np.rint(255 * np.clip(gray, 0, 1)).astype(np.uint8)


def _texture(name: str, across: Floats, along: Floats, radius: Floats) -> Floats:
    """Compute a texture's values, in about [-1, 1], at places given in periods."""
    turn = 2 * np.pi
    values: Floats
    if name == "stripes":
        values = np.sin(turn * across)
    elif name == "checks":
        values = np.tanh(4 * np.sin(turn * across / 1.4) * np.sin(turn * along / 1.4))
    elif name == "grid":
        values = 2 * np.maximum(_line(across / 1.4), _line(along / 1.4)) - 1
    elif name == "rings":
        values = np.sin(turn * radius)
    elif name == "waves":
        values = np.sin(turn * (across + 0.35 * np.sin(turn * along / 3)))
    elif name == "zigzag":
        values = np.sin(turn * (across + 1.1 * np.abs(2 * (along / 2 % 1) - 1)))
    else:  # dots
        distance = np.hypot(across / 1.3 % 1 - 0.5, along / 1.3 % 1 - 0.5)
        values = -np.tanh(12 * (distance - 0.27))
    return values


def _line(place: Floats) -> Floats:
    """Return 1 on thin lines through the whole numbers, and 0 between them."""
    values: Floats = np.exp(-((((place + 0.5) % 1 - 0.5) / 0.13) ** 2))
    return values


def _band_noise(seed: int, ids: NDArray[np.int64], x: Floats, y: Floats, period: Floats) -> Floats:
    """Add up plane waves of about one frequency in all directions.

    The sum has no lines, no center and no lattice.
    """
    total: Floats = np.zeros((len(ids), *x.shape))
    for wave in range(_WAVES):
        u = uniform(draw_words(seed, Domain.SYNTHETIC, ids, minor=16 + wave))
        angle, frequency = 2 * np.pi * u[:, 0], (0.8 + 0.4 * u[:, 1]) / period
        fx, fy = _grid(frequency * np.cos(angle)), _grid(frequency * np.sin(angle))
        total += np.sin(2 * np.pi * (fx * x + fy * y + _grid(u[:, 2])))
    total /= _WAVES**0.5
    return total


def _pixel_noise(seed: int, ids: NDArray[np.int64], size: int) -> Floats:
    """Draw independent values [N, size, size] of mean 0 and standard deviation 1."""
    draws = -(-size * size // 4)
    words = np.concatenate(
        [draw_words(seed, Domain.SYNTHETIC, ids, minor=_PIXELS + i) for i in range(draws)], axis=1
    )
    flat = (uniform(words[:, : size * size]) - 0.5) * 12**0.5
    return flat.reshape(len(ids), size, size)


def _grid(values: Floats) -> Floats:
    """Reshape [N] to [N, 1, 1], so that the values broadcast over images [N, H, W]."""
    return values[:, None, None]
