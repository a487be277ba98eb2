"""Name the samples of a batch, and say how their views were cut and distorted."""

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.decode import PixelRules
from shards.errors import printable
from shards.index import Index
from shards.reader import BlockReader, read_blocks
from shards.views import ColorOperation, Column, ViewsConfig, crop_box, draw_views

AHEAD = 4  # blocks that are fetched ahead

Row = dict[str, Any]


def describe(
    index: Index,
    rules: PixelRules,
    config: ViewsConfig,
    seed: int,
    epoch: int,
    ids: NDArray[np.int64],
) -> list[Row]:
    """Return a row for each of the samples `ids` [B]: names, label, and the parameters of views.

    Their blocks are fetched for that. Raises InputError when a block cannot be read.
    """
    draws = draw_views(seed, epoch, ids, config)
    wanted: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, sample in enumerate(ids.tolist()):
        wanted[find_block(index, sample)].append(row)
    found: dict[int, Row] = {}
    reader = BlockReader(index, rules=rules)
    for place, block in read_blocks(reader, sorted(wanted), AHEAD):
        first_id = index.first_id(*place)
        for row in wanted[place]:
            position = int(ids[row]) - first_id
            label = block.label(position)
            facts: Row = {"sample": int(ids[row]), "shard": index.shards[place[0]].name}
            facts |= {"key": printable(block.samples[position].key), "label": label}
            known = label >= 0 and index.classes
            facts["class"] = printable(index.classes[label]) if known else ""
            _, height, width = reader.decode(block, position).shape
            for view in range(len(config.views)):
                box = crop_box(draws.crop[view, row], height, width, config)
                facts |= _view(f"view{view + 1}_", box, draws.params[view, row])
            found[row] = facts
    return [found[row] for row in range(len(ids))]


def find_block(index: Index, sample: int) -> tuple[int, int]:
    """Return the shard and the block that hold a sample."""
    shard = index.find_shard(sample)
    ends = np.cumsum(index.blocks(shard)[:, 1])
    block = np.searchsorted(ends, sample - index.first_ids[shard], side="right")
    return shard, int(block)


def _view(prefix: str, box: tuple[int, int, int, int], params: NDArray[np.float32]) -> Row:
    """Return the crop and the distortions of one view by the names of their columns."""
    names = [operation.name.lower() for operation in ColorOperation]
    facts: Row = dict(zip(("top", "left", "height", "width"), box, strict=True))
    for column in (Column.FLIP, Column.JITTER, Column.GRAYSCALE, Column.SOLARIZE):
        facts[column.name.lower()] = int(params[column])
    factors = params[Column.FACTORS : Column.FACTORS + len(names)]
    facts |= {name: float(factor) for name, factor in zip(names, factors, strict=True)}
    order = params[Column.ORDER : Column.ORDER + len(names)]
    facts["order"] = " ".join(names[int(number)] for number in order)
    facts["blur_sigma"] = float(params[Column.SIGMA])
    return {prefix + name: value for name, value in facts.items()}
