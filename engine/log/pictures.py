"""Draw the views of a batch as one picture."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torchvision.utils import make_grid

from engine.method.augment import denormalize

COLUMNS = 16


def draw_views(views: Tensor) -> NDArray[np.uint8]:
    """Draw both views [2, n, 3, S, S] as one picture [H, W, 3], with rows of the two in turn.

    They are normalized, as the network sees them.
    """
    images = denormalize(views).clamp(0, 1).float().cpu()
    columns = min(views.shape[1], COLUMNS)
    images = pad(images, (0,) * 7 + (-views.shape[1] % columns,))  # the last rows may be shorter
    rows = images.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2)
    grid = make_grid(rows, nrow=columns).mul(255).round().byte()
    pixels: NDArray[np.uint8] = grid.permute(1, 2, 0).numpy()
    return pixels
