"""Read a few real images, cut as an encoder takes them, of shards or of a plain folder."""

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice

import torch
from torch import Tensor

from engine.encoder.preprocessing import Transform, decode_file
from engine.encoder.source import Source
from engine.evaluation.given_sets import find_images
from shards import index as indexes
from shards.center_crops import CropReader
from shards.decode import DecodeError
from shards.errors import InputError
from shards.making.convert import PixelOptions
from shards.storage import files


def read_examples(
    url: str, name: str, source: Source, count: int, report: Callable[[str], None]
) -> Tensor:
    """Return up to `count` images [N, 3, S, S] uint8, the first ones that can be decoded.

    Args:
        url: The folder of shards or of images.
        name: The field that gave it, for messages.
        source: The encoder that takes the images.
        report: Takes a line about each image that is left out.

    Raises InputError when there are no images.
    """
    if not files.exists(files.join(url, indexes.NAME)):
        images = list(islice(_read_files(url, name, source, report), count))
        if not images:
            raise InputError(f"{name} {files.redact(url)}: none of its images can be decoded")
        return torch.stack(images)
    crops = CropReader(
        source.size, source.crop, threads=1, corrupt=1, report=report, rules=source.rules
    )
    with closing(crops.read(indexes.load(url, name), limit=count)) as batches:
        return next(batches).images[:count]


def _read_files(
    url: str, name: str, source: Source, report: Callable[[str], None]
) -> Iterator[Tensor]:
    """Yield the images of a folder, in the order of their names."""
    options, cut = PixelOptions(source.rules.max_pixels), Transform(source.size, source.crop)
    for image in find_images(url, name, labels=False).images.images:
        place = files.join(url, image.path)
        try:
            yield cut.crop_pixels(decode_file(image.path, files.read(place), options, source.rules))
        except DecodeError as error:
            report(f"{files.redact(place)}: {error}; left out")
        except InputError:  # It needs a window of values.
            raise InputError(
                f"{name} {files.redact(place)}: has more than 8 bits per channel: pack these "
                "images by `python launch/pack.py`, which has --window, and give the shards"
            ) from None
