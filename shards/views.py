"""Configure the views of an image, and draw the random parameters of every sample's views.

The parameters are a pure function of (seed, epoch, sample id, view). The host cuts the crop while
decoding, once the image's size is known. The device does everything else.

Source: arXiv 2006.07733, appendix B, and the ranges of the official code.
"""

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from shards.fields import Range, UnitInterval
from shards.philox import Domain, draw, uniform


class ColorOperation(IntEnum):
    """The color operations of the jitter.

    The order columns of `ViewDraws.params` hold these values, which must never change.
    """

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


class Column(IntEnum):
    """The column of each parameter in a row of `ViewDraws.params`.

    FACTORS and ORDER are each the first of four columns. FACTORS holds the factor of each
    `ColorOperation`. ORDER holds the operation at each position.
    """

    FLIP = 0
    JITTER = 1
    GRAYSCALE = 2
    SOLARIZE = 3
    FACTORS = 4
    ORDER = 8
    SIGMA = 12


COLUMNS = 13


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """The random distribution of one view's distortions, in the order in which they apply."""

    flip: UnitInterval = 0.5
    """Probability of a horizontal flip."""
    jitter: UnitInterval = 0.8
    """Probability of the color jitter: the next four operations in random order, each clipped to
    [0, 1]."""
    brightness: UnitInterval = 0.4
    """Largest brightness that is added or subtracted. 1 turns black into white."""
    contrast: UnitInterval = 0.4
    """Largest change of the contrast factor about the mean of each channel, up or down from 1."""
    saturation: UnitInterval = 0.2
    """Largest change of the saturation factor in HSV, up or down from 1."""
    hue: Annotated[float, Interval(ge=0, le=0.5)] = 0.1
    """Largest hue shift in HSV, in turns of the color circle."""
    grayscale: UnitInterval = 0.2
    """Probability that the color is dropped."""
    blur: UnitInterval
    """Probability of a Gaussian blur."""
    blur_sigma: Range = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels."""
    solarize: UnitInterval
    """Probability that all values of at least one half are inverted."""


@dataclass(frozen=True)
class ViewsConfig:
    """The two views of an image. Each is a random resized crop with its own distortion."""

    size: Annotated[int, Interval(ge=1, le=2**12)] = 224
    """Side of a view, in pixels."""
    area: Annotated[Range, Interval(le=1)] = (0.08, 1.0)
    """Range of the crop's area, as a fraction of the image's."""
    ratio: Range = (3 / 4, 4 / 3)
    """Range of the crop's width over its height (log-uniform)."""
    view1: ViewConfig = field(default_factory=lambda: ViewConfig(blur=1.0, solarize=0.0))
    """Distribution of the first view."""
    view2: ViewConfig = field(default_factory=lambda: ViewConfig(blur=0.1, solarize=0.2))
    """Distribution of the second view."""

    @property
    def views(self) -> tuple[ViewConfig, ...]:
        """The V views, in order."""
        return self.view1, self.view2

    @property
    def ever_blur(self) -> bool:
        """Whether any view can be blurred. If not, the device may leave the blur out."""
        return any(view.blur > 0 for view in self.views)


@dataclass(frozen=True)
class OneView(ViewsConfig):
    """A configuration of the first view only, for training with labels."""

    @property
    def views(self) -> tuple[ViewConfig, ...]:
        return (self.view1,)


def crop_and_flip(size: int) -> OneView:
    """Return views that are a random crop and a flip, as the official evaluations train on.

    Args:
        size: Side of the crop, in pixels.
    """
    plain = ViewConfig(jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)
    return OneView(size=size, view1=plain)


class ViewDraws(NamedTuple):
    """The random parameters of a batch of B samples in V views."""

    crop: NDArray[np.float64]  # [V, B, 4] uniforms for `crop_box`
    params: NDArray[np.float32]  # [V, B, COLUMNS] parameters for `engine.method.augment`


class _Draw(IntEnum):
    """The draws for one view of one sample, of four random words each.

    The values must never change.
    """

    CROP = 0
    GATES = 1
    FACTORS = 2
    ORDER = 3
    BLUR = 4


_DRAWS_PER_VIEW = 8  # This leaves room for new draws that do not change the others.


def draw_views(seed: int, epoch: int, ids: NDArray[np.int64], config: ViewsConfig) -> ViewDraws:
    """Draw the parameters of the samples `ids` [B] in one epoch, for all views.

    A row depends only on its own id, the view, the seed and the epoch.
    """
    ids = np.asarray(ids, np.int64)
    crop = np.empty((len(config.views), len(ids), 4), np.float64)
    params = np.empty((len(config.views), len(ids), COLUMNS), np.float32)
    parts = np.arange(len(_Draw))[:, None]
    for number, view in enumerate(config.views):
        minor = number * _DRAWS_PER_VIEW + parts
        words = draw(seed, Domain.VIEW, ids, epoch, minor)  # [parts, B, 4]
        crop[number] = uniform(words[_Draw.CROP])
        gates = uniform(words[_Draw.GATES])
        chances = (view.flip, view.jitter, view.grayscale, view.solarize)
        params[number, :, Column.FLIP : Column.SOLARIZE + 1] = gates < chances
        center = np.array((0.0, 1.0, 1.0, 0.0))
        reach = np.array((view.brightness, view.contrast, view.saturation, view.hue))
        factors = center + reach * (2 * uniform(words[_Draw.FACTORS]) - 1)
        params[number, :, Column.FACTORS : Column.FACTORS + 4] = factors
        order = np.argsort(words[_Draw.ORDER], axis=1, kind="stable")
        params[number, :, Column.ORDER : Column.ORDER + 4] = order
        blur = uniform(words[_Draw.BLUR])
        low, high = view.blur_sigma
        sigma = low + (high - low) * blur[:, 1]
        params[number, :, Column.SIGMA] = np.where(blur[:, 0] < view.blur, sigma, 0.0)
    return ViewDraws(crop, params)


def crop_box(
    uniforms: NDArray[np.float64], height: int, width: int, config: ViewsConfig
) -> tuple[int, int, int, int]:
    """Compute the crop of one view as (top, left, height, width), in pixels.

    Like the official sampler, this takes area and aspect ratio from one draw and clamps the sides
    to the image. torchvision's `RandomResizedCrop` draws again, up to ten times, instead.

    Args:
        uniforms: [4] Random numbers in [0, 1).
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
    """
    u_area, u_ratio, u_top, u_left = uniforms.tolist()
    area = (config.area[0] + (config.area[1] - config.area[0]) * u_area) * height * width
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = math.exp(low + (high - low) * u_ratio)
    crop_width = min(max(round(math.sqrt(area * ratio)), 1), width)
    crop_height = min(max(round(math.sqrt(area / ratio)), 1), height)
    top = int(u_top * (height - crop_height + 1))
    left = int(u_left * (width - crop_width + 1))
    return top, left, crop_height, crop_width
