"""Draw images beside their nearest neighbors: choose some, read them, and put them on a sheet."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.evaluation.features import Features
from engine.evaluation.knn import Neighbours
from engine.processes.world import World
from engine.state import layout
from shards.center_crops import CropReader
from shards.index import Index
from shards.png import encode_png
from shards.storage import files

ROWS, COLUMNS = 8, 6  # images on a run's own sheet, and the neighbors beside each
SMALL = 72  # side of an image on a run's own sheet, in pixels
BORDER = 4  # width of a border, in pixels
RIGHT, WRONG, NEUTRAL = (46, 160, 67), (207, 34, 46), (140, 149, 159)

Images = dict[int, NDArray[np.uint8]]  # [S, S, 3] by sample id


class Example(NamedTuple):
    """One image that was looked up, and its neighbors, nearest first."""

    id: int
    label: int  # -1 where there is none
    near: list[int]  # sample ids
    near_labels: list[int]


def list_examples(queries: Features, found: Neighbours, columns: int) -> list[Example]:
    """List this process's queries, each with its first `columns` neighbors."""
    near, labels = (part[:, :columns].tolist() for part in (found.ids, found.labels))
    rows = zip(queries.ids.tolist(), queries.labels.tolist(), near, labels, strict=True)
    return [Example(*row) for row in rows]


def choose_examples(
    queries: Features, found: Neighbours, samples: int, world: World
) -> list[Example]:
    """Choose a few of all processes' queries, evenly spread, whatever the number of processes.

    All processes call it together.

    Args:
        samples: Number of images of the set that the queries are from.
    """
    order = queries.ids.argsort()
    targets = torch.arange(ROWS, device=order.device) * samples // ROWS
    places = torch.searchsorted(queries.ids[order], targets).unique()  # of the next ones
    some = order[places[places < len(order)]]
    own = (Features(*(part[some] for part in queries)), Neighbours(*(part[some] for part in found)))
    held = world.all_gather_object(list_examples(*own, COLUMNS))
    by_id = {one.id: one for examples in held for one in examples}
    following = ([n for n in sorted(by_id) if n >= target] for target in targets.tolist())
    return [by_id[n] for n in sorted({found[0] for found in following if found})]


def draw_sheet(examples: list[Example], queries: Images, bank: Images) -> NDArray[np.uint8]:
    """Draw a row for each example: the image and then its neighbors. The result is [H, W, 3].

    A neighbor's border is green when it has the image's label and red when it has another one. It
    is gray when one of the two has no label.
    """
    rows = []
    for example in examples:
        row = [_draw_frame(queries[example.id], NEUTRAL)]
        for near, label in zip(example.near, example.near_labels, strict=True):
            known = example.label >= 0 and label >= 0
            color = NEUTRAL if not known else RIGHT if label == example.label else WRONG
            row.append(_draw_frame(bank[near], color))
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


def read_images(crops: CropReader, index: Index, ids: list[int], side: int) -> Images:
    """Read central crops of some images of a data set, by one process."""
    wanted = np.unique(np.array(ids, np.int64))
    return {
        number: image.permute(1, 2, 0).numpy()
        for batch in replace(crops, size=side, part=(0, 1)).read(index, ids=wanted)
        for number, image in zip(batch.ids.tolist(), batch.images, strict=True)
    }


def write_sheet(
    run: str, step: int, examples: list[Example], crops: CropReader, bank: Index, val: Index
) -> str:
    """Draw the sheet of a run's evaluation at `step` into RUN/neighbours, and return its URL.

    Raises InputError and OSError when the images cannot be read, and OSError when the sheet cannot
    be written.
    """
    queries = read_images(crops, val, [one.id for one in examples], SMALL)
    near = [number for one in examples for number in one.near]
    sheet = draw_sheet(examples, queries, read_images(crops, bank, near, SMALL))
    url = files.join(run, layout.NEIGHBOURS, f"step_{step:08}.png")
    files.write(url, encode_png(sheet))
    return url


def _draw_frame(image: NDArray[np.uint8], color: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Add a colored border to an image, and a white border around that."""
    side = len(image) + 4 * BORDER
    framed = np.full((side, side, 3), 255, np.uint8)
    framed[BORDER:-BORDER, BORDER:-BORDER] = color
    framed[2 * BORDER : -2 * BORDER, 2 * BORDER : -2 * BORDER] = image
    return framed
