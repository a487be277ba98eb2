"""Draw the views of a batch as sheets: both views of an image side by side, with a caption."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS = 8, 8
LEAST = 96  # Smaller views are enlarged by whole numbers to at least that many pixels.
BETWEEN, GAP, CAPTION = 2, 6, 14  # pixels: between the views of an image, and around


def draw_sheet(pictures: NDArray[np.uint8], captions: list[str]) -> NDArray[np.uint8]:
    """Draw the views [V, n, S, S, 3] of n images; return the pixels of the sheet, [H, W, 3]."""
    views, count, size = pictures.shape[:3]
    factor = max(1, -(-LEAST // size))
    side = size * factor
    columns, rows = min(COLUMNS, count), -(-count // COLUMNS)
    width, height = views * (side + BETWEEN) + GAP, side + CAPTION + GAP
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, caption in enumerate(captions):
        left, top = number % columns * width, number // columns * height
        for view in range(views):
            large = pictures[view, number].repeat(factor, axis=0).repeat(factor, axis=1)
            sheet.paste(Image.fromarray(large), (left + view * (side + BETWEEN), top + CAPTION))
        pen.text((left, top), caption, fill="black", font=font)
    return np.asarray(sheet)
