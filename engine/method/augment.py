"""Augment views on the device, a whole batch at once, each sample with its own parameters.

Images are RGB in [0, 1]. All rows take the same path. Where a row is to be spared an operation, it
gets neutral parameters, or the result is dropped. So there are no branches and no host
synchronization, and `torch.compile(fullgraph=True)` makes one graph. Autocast and TF32 change no
operation used here.

Source: arXiv 2006.07733, appendix B. The operations match the official `augmentations.py` exactly.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from shards.views import ColorOperation, Column

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB
STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.5870, 0.1140)
# These are plain numbers, because torch.compile of torch 2.11 cannot trace a loop over an Enum.
OPERATIONS = tuple(operation.value for operation in ColorOperation)
CPU_PIXELS = 1 << 18  # pixels that a CPU processes at once: 5 images of 224 x 224


def augment(images: Tensor, params: Tensor, *, blur: bool = True) -> Tensor:
    """Turn cropped images into the network's input: `distort`, then `normalize`.

    Args:
        images: [N, 3, H, W], uint8, or float in [0, 1], whose dtype is then kept.
        params: [N, shards.views.COLUMNS], rows of `ViewDraws.params`.
        blur: False leaves the blur out, for recipes that never blur a view.

    Returns:
        [N, 3, H, W], float32 (or the images' float dtype), channels_last.
    """
    # A GPU processes all rows at once. A CPU processes only as many as fit its caches: at 224 px
    # that is about three times as fast.
    rows = len(images) if images.is_cuda else max(1, CPU_PIXELS // images[0, 0].numel())
    parts = [
        normalize(distort(some_images, some_params, blur=blur))
        for some_images, some_params in zip(images.split(rows), params.split(rows), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def distort(images: Tensor, params: Tensor, *, blur: bool = True) -> Tensor:
    """Do all of `augment` except the normalization; return [N, 3, H, W] in [0, 1]."""
    params = params.to(images.dtype if images.is_floating_point() else torch.float32)
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
    return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)


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
    """Multiply the HSV saturation of x [N, 3, H, W] by `factor` [N], up to at most 1."""
    return saturation_and_hue(x, factor, torch.zeros_like(factor))


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
    # arbitrary hue, which does not matter because their chroma is 0.
    from_red = ((green - red) + (blue - least)) / chroma.clamp_min(torch.finfo(x.dtype).tiny)
    sixths = torch.copysign(1 + from_red, green - blue) + 6 * turns[:, None, None]
    sixths = sixths - 6 * (sixths / 6).floor()  # [0, 6]
    chroma = torch.minimum(chroma * factor[:, None, None], value)
    floor = value - chroma
    # Each channel has a share of the chroma: 1 within one sixth of its own hue, 0 beyond two.
    shares = ((sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs())
    return torch.stack([floor + chroma * share.clamp(0, 1) for share in shares], dim=1)


def grayscale(x: Tensor) -> Tensor:
    """Set all three channels of x [N, 3, H, W] to its luma."""
    red, green, blue = x.unbind(1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue  # [N, H, W]
    return luma[:, None].expand_as(x)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur x [N, 3, H, W] with a Gaussian of `sigma` [N] pixels; 0 leaves a row as it is.

    The window reaches H // 20 pixels in each direction. Pixels outside the image count as black,
    so borders darken.
    """
    height, width = x.shape[-2:]
    radius = height // 20
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    # A sigma of 0 would divide by 0. With 0.01 all weights but the middle one are exactly 0.
    sigma = sigma.clamp_min(0.01)[:, None]
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = weights / weights.sum(1, keepdim=True)  # [N, 2 radius + 1]

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


def _per_row(values: Tensor) -> Tensor:
    """Reshape [N] to [N, 1, 1, 1], which broadcasts with images."""
    return values[:, None, None, None]
