"""Augment views on the device, a whole batch at once, each sample with its own parameters.

Images are RGB in [0, 1]. On a GPU all rows take the same path. Where a row is to be spared an
operation, it gets neutral parameters, or the result is dropped. So there are no branches and no
host synchronization, and `torch.compile(fullgraph=True)` makes one graph. On a CPU nothing waits
for a choice, so a row takes only the operations that it needs. Autocast and TF32 change no
operation used here.

Source: arXiv 2006.07733, appendix B. The operations match the official `augmentations.py` exactly.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.method.compute_once import compute_once
from shards.views import ColorOperation, Column

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB
STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.5870, 0.1140)
# These are plain numbers, because torch.compile of torch 2.11 cannot trace a loop over an Enum.
OPERATIONS = tuple(operation.value for operation in ColorOperation)
CPU_PIXELS = 1 << 17  # pixels that each thread processes at once: 2 images of 224 x 224


def augment(images: Tensor, params: Tensor, *, blur: bool = True) -> Tensor:
    """Turn cropped images into the network's input: `distort`, then `normalize`.

    Args:
        images: [N, 3, H, W], uint8, or float in [0, 1], whose dtype is then kept.
        params: [N, shards.views.COLUMNS], rows of `ViewDraws.params`.
        blur: False leaves the blur out, for recipes that never blur a view.

    Returns:
        [N, 3, H, W], float32 (or the images' float dtype), channels_last.
    """
    if not _can_choose(images):
        return normalize(distort(images, params, blur=blur))
    dtype = images.dtype if images.is_floating_point() else torch.float32
    out = torch.empty(images.shape, dtype=dtype, memory_format=torch.channels_last)
    # Rows with the same order of colors are processed together, and only as many at once as fit
    # the caches of the threads.
    orders = params[:, [Column.JITTER, *range(Column.ORDER, Column.ORDER + 4)]].tolist()
    alike = torch.tensor(sorted(range(len(orders)), key=orders.__getitem__))
    count = max(1, CPU_PIXELS * torch.get_num_threads() // images[0, 0].numel())
    for rows in alike.split(count):
        some = images.index_select(0, rows), params.index_select(0, rows)
        out.index_copy_(0, rows, normalize(distort(*some, blur=blur)))
    return out


def distort(images: Tensor, params: Tensor, *, blur: bool = True) -> Tensor:
    """Do all of `augment` except the normalization; return [N, 3, H, W] in [0, 1]."""
    params = params.to(images.dtype if images.is_floating_point() else torch.float32)
    way = distort_chosen if _can_choose(images) else distort_together
    return way(images, params, blur=blur)


def distort_together(images: Tensor, params: Tensor, *, blur: bool) -> Tensor:
    """Distort all rows in the same way, with no choice that depends on the values of `params`."""
    jittered, gray, solarized = (
        params[:, column, None, None, None] > 0
        for column in (Column.JITTER, Column.GRAYSCALE, Column.SOLARIZE)
    )  # [N, 1, 1, 1]
    factors = params[:, Column.FACTORS : Column.FACTORS + 4]
    order = params[:, Column.ORDER : Column.ORDER + 4]

    x = flip(images, params)
    if not x.is_floating_point():
        x = x.float() / 255
    x = torch.where(jittered, jitter(x, factors, order), x)
    x = torch.where(gray, grayscale(x), x).clamp(0, 1)
    if blur:
        x = gaussian_blur(x, params[:, Column.SIGMA])
    x = torch.where(solarized, solarize(x), x)
    return x.clamp(0, 1)


def distort_chosen(images: Tensor, params: Tensor, *, blur: bool) -> Tensor:
    """Do the same as `distort_together`, where each row takes only what it needs."""
    drawn = params.tolist()
    factors = params[:, Column.FACTORS : Column.FACTORS + 4]
    orders, reaches = defaultdict(list), defaultdict(list)  # the rows of each
    for row, values in enumerate(drawn):
        if values[Column.JITTER] > 0:
            orders[tuple(values[Column.ORDER : Column.ORDER + 4])].append(row)
        if blur:
            reaches[_blur_reach(values[Column.SIGMA], images)].append(row)
    flipped, gray, solarized = (
        [row for row, values in enumerate(drawn) if values[column] > 0]
        for column in (Column.FLIP, Column.GRAYSCALE, Column.SOLARIZE)
    )

    x = images.clone() if images.is_floating_point() else images.float().div_(255)
    x = _change(x, flipped, lambda some: some.flip(-1))
    for order, rows in orders.items():
        x = _change(x, rows, partial(_jitter_alike, order=order), factors)
    x = _change(x, gray, grayscale).clamp(0, 1)
    for reach in reaches.keys() - {0}:
        some_blur = partial(gaussian_blur, radius=reach)
        x = _change(x, reaches[reach], some_blur, params[:, Column.SIGMA])
    return _change(x, solarized, solarize).clamp_(0, 1)


def flip(images: Tensor, params: Tensor) -> Tensor:
    """Mirror the images [N, 3, H, W] of the rows whose params ask for it; any dtype.

    `params` is the same as for `augment`.
    """
    flipped = params[:, Column.FLIP, None, None, None] > 0  # [N, 1, 1, 1]
    return torch.where(flipped, images.flip(-1), images)


def normalize(x: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its deviation: [N, 3, H, W], channels_last."""
    channels = [
        (channel - mean) / std for channel, mean, std in zip(x.unbind(1), MEAN, STD, strict=True)
    ]
    if _can_choose(x):  # a CPU stacks channels three times as slowly as it copies them
        out = torch.empty_like(x, memory_format=torch.channels_last)
        for number, channel in enumerate(channels):
            out[:, number] = channel
        return out
    return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)


def denormalize(x: Tensor) -> Tensor:
    """Undo `normalize`: [..., 3, H, W], with values in about [0, 1]."""
    mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return x * std + mean


def jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Apply the four color operations in each row's order, and clip to [0, 1] after each.

    Args:
        x: [N, 3, H, W] in [0, 1].
        factors: [N, 4], the parameter of each `ColorOperation`.
        order: [N, 4], the number of the `ColorOperation` at each position.
    """
    delta, stretch, saturate, turns = factors.unbind(1)  # [N], in `ColorOperation` order
    for position in order.unbind(1):
        bright, stretched, saturated, turned = (position == number for number in OPERATIONS)
        # Every row takes all operations; those that are not its turn get neutral parameters.
        x = brightness(x, torch.where(bright, delta, 0))
        x = contrast(x, torch.where(stretched, stretch, 1)).clamp(0, 1)
        x = saturation_and_hue(
            x, torch.where(saturated, saturate, 1), torch.where(turned, turns, 0)
        ).clamp(0, 1)
    return x


def brightness(x: Tensor, delta: Tensor) -> Tensor:
    """Add `delta` [N] to x [N, 3, H, W], without clipping."""
    return x + _per_row(delta)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale x [N, 3, H, W] by `factor` [N] about each channel's mean, without clipping."""
    mean = x.mean((2, 3), keepdim=True)
    return torch.lerp(mean, x, _per_row(factor))


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the HSV saturation of x [N, 3, H, W] by `factor` [N], up to at most 1.

    The distances from the largest channel grow by the factor, and at most until one channel is 0.
    So this needs no hue.
    """
    value = x.amax(1, keepdim=True)  # [N, 1, H, W]
    chroma = (value - x.amin(1, keepdim=True)).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.lerp(value, x, torch.minimum(value / chroma, _per_row(factor)))


def hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the HSV hue of x [N, 3, H, W] by `turns` [N] of the color circle."""
    return saturation_and_hue(x, torch.ones_like(turns), turns)


def saturation_and_hue(x: Tensor, factor: Tensor, turns: Tensor) -> Tensor:
    """Change saturation and hue in one conversion to HSV and back.

    Args:
        x: [N, 3, H, W] in [0, 1].
        factor: [N], multiplies the saturation.
        turns: [N], added to the hue, in turns of the color circle.
    """
    red, green, blue = x.unbind(1)  # [N, H, W]
    value, least = x.amax(1), x.amin(1)
    chroma = value - least
    # The hue is in sixths of a turn, from -3 to 3: 0 at red, 2 at green, -2 at blue. One expression
    # covers all cases, because torch.where on pixels is slow on a CPU. Gray pixels get an
    # arbitrary hue, which does not matter because their chroma is 0. Changes in place keep a CPU
    # in its caches.
    tiny = torch.finfo(x.dtype).tiny
    from_red = (green - red).add_(blue - least).div_(chroma.clamp_min(tiny))
    sixths = torch.copysign(from_red.add_(1), green - blue).add_(6 * turns[:, None, None])
    sixths.sub_((sixths / 6).floor_().mul_(6))  # [0, 6]
    chroma = torch.minimum(chroma.mul_(factor[:, None, None]), value)
    floor = value - chroma
    # Each channel has a share of the chroma: 1 within one sixth of its own hue, 0 beyond two.
    shares = (
        (sixths - 3).abs_().sub_(1),
        (sixths - 2).abs_().neg_().add_(2),
        (sixths - 4).abs_().neg_().add_(2),
    )
    return torch.stack([share.clamp_(0, 1).mul_(chroma).add_(floor) for share in shares], dim=1)


def grayscale(x: Tensor) -> Tensor:
    """Set all three channels of x [N, 3, H, W] to its luma."""
    red, green, blue = x.unbind(1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue  # [N, H, W]
    return luma[:, None].expand_as(x)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int | None = None) -> Tensor:
    """Blur x [N, 3, H, W] with a Gaussian of `sigma` [N] pixels; 0 leaves a row as it is.

    The window reaches `radius` pixels in each direction, H // 20 by default. Pixels outside the
    image count as black, so borders darken.
    """
    height, width = x.shape[-2:]
    radius = height // 20 if radius is None else radius
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    # A sigma of 0 would divide by 0. With 0.01 all weights but the middle one are exactly 0.
    sigma = sigma.clamp_min(0.01)[:, None]
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = weights / weights.sum(1, keepdim=True)  # [N, 2 radius + 1]
    (weights,) = compute_once(weights)

    # The blur is a sum of shifted images, first vertically and then horizontally. This is faster
    # than matrix products or grouped convolutions, and autocast and TF32 do not round it.
    for dim, length, padding in ((2, height, (0, 0, radius, radius)), (3, width, (radius, radius))):
        padded = F.pad(x, padding)
        x = torch.zeros_like(x)
        for shift, weight in enumerate(weights.unbind(1)):
            x.addcmul_(padded.narrow(dim, shift, length), _per_row(weight))
    return x


def solarize(x: Tensor, threshold: float | Tensor = 0.5) -> Tensor:
    """Invert the values of x [N, 3, H, W] that are at least `threshold`."""
    # With a mask of pixels, lerp is as exact as torch.where and several times faster on a CPU.
    return torch.lerp(x, 1 - x, (x >= threshold).to(x.dtype))


def _can_choose(images: Tensor) -> bool:
    """Return whether it costs nothing to choose rows by their parameters.

    A GPU would have to wait for the host, and a compiled graph would break.
    """
    return images.device.type == "cpu" and not torch.compiler.is_compiling()


def _change(
    x: Tensor, rows: list[int], operation: Callable[..., Tensor], *values: Tensor
) -> Tensor:
    """Return x [N, 3, H, W] with some rows changed, by an operation that takes also `values` [N].

    x itself may be changed.
    """
    if len(rows) == len(x):
        return operation(x, *values)
    if rows:
        some = torch.tensor(rows)
        x.index_copy_(
            0, some, operation(*(tensor.index_select(0, some) for tensor in (x, *values)))
        )
    return x


def _jitter_alike(x: Tensor, factors: Tensor, order: tuple[float, ...]) -> Tensor:
    """Do what `jitter` does, for rows that have the same order."""
    operations = (brightness, contrast, saturation, hue)  # in `ColorOperation` order
    for number in map(int, order):
        x = operations[number](x, factors[:, number]).clamp_(0, 1)
    return x


def _blur_reach(sigma: float, images: Tensor) -> int:
    """Return how far a blur reaches, without the weights that are less than rounding errors."""
    precision = images.dtype if images.is_floating_point() else torch.float32
    reach = sigma * math.sqrt(2 * math.log(8 / torch.finfo(precision).eps))
    return int(min(reach, images.shape[-2] // 20))


def _per_row(values: Tensor) -> Tensor:
    """Reshape [N] to [N, 1, 1, 1], which broadcasts with images."""
    return values[:, None, None, None]
