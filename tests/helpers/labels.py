"""Pack drawn images of which only some have labels, or none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from shards.index import Index
from shards.making import pack, synthetic
from shards.png import encode_png


def draw_some(
    folder: Path | str,
    samples: int,
    has_label: Callable[[int], bool],
    *,
    seed: int = 0,
    classes: tuple[str, ...] = tuple(synthetic.CLASSES),
) -> Index:
    """Draw images of 32 pixels and pack them; those with `has_label(number)` get their label."""
    images, labels = synthetic.draw(seed, np.arange(samples), 32)
    contents = {f"{i}.png": encode_png(image[..., 0]) for i, image in enumerate(images)}
    entries = [
        pack.Image(path, len(content), int(labels[i]) if has_label(i) else -1)
        for i, (path, content) in enumerate(contents.items())
    ]
    names = list(classes) if any(entry.label >= 0 for entry in entries) else []
    plan = pack.plan_shards(pack.ImageSet("", entries, names), 10**6, seed)
    return pack.write_shards(plan, str(folder), lambda i: contents[i.path], threads=1)[0]
