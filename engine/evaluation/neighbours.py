"""Show what an encoder finds similar: draw images beside their nearest neighbors.

The features are also written for tensorboard's projector.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor

from engine.evaluation.features import Features
from engine.evaluation.knn import find_nearest
from engine.evaluation.session import Evaluation
from engine.evaluation.sheet import draw_sheet, list_examples, read_images
from engine.state.layout import SHEET
from shards.errors import printable
from shards.png import encode_png
from shards.storage import files
from shards.storage.commands import quote

SIDE = 96  # side of an image on the sheet, in pixels
SPRITE = 8192  # side of tensorboard's largest sprite, in pixels


@dataclass(frozen=True)
class NeighboursConfig:
    """Options of the sheet of neighbors and of the projector."""

    queries: Annotated[int, Interval(ge=1, le=256)] = 16
    """Number of images of data.val that are looked up, evenly spread. Each gets a row."""
    neighbours: Annotated[int, Interval(ge=1, le=64)] = 8
    """Number of nearest images of data.train that are shown beside each."""
    bank: Annotated[int, Interval(ge=1, le=2**31)] = 50_000
    """Approximate number of training images that are searched."""
    points: Annotated[int, Interval(ge=0, le=100_000)] = 2000
    """Number of images of data.val in tensorboard's projector. 0 leaves the projector out."""

    def settings(self) -> dict[str, Any]:
        """Return the options that decide the result."""
        return asdict(self)


def draw(evaluation: Evaluation, config: NeighboursConfig) -> None:
    """Write RUN/evaluations/.../neighbours.png and the projector's files in RUN/evaluations.

    All processes call it together.
    """
    val, world = evaluation.val, evaluation.world
    ids = _spread(val.samples, max(config.queries, config.points))
    found = _gather(evaluation, evaluation.extract(val, ids=ids, unlabeled=True))
    bank = evaluation.extract(evaluation.train, limit=config.bank, unlabeled=True)
    some = _spread(len(found.ids), config.queries)
    asked = Features(*(tensor[some] for tensor in found))
    # Every process looks up all of the queries, because there are only a few.
    near = find_nearest(bank, asked.features, config.neighbours, world)
    if not world.main:
        return
    if near.ids.shape[1] < config.neighbours:
        evaluation.terminal.say(
            f"--neighbours {config.neighbours}: limited to {near.ids.shape[1]:,}, which are all "
            "images that are searched"
        )
    examples, crops = list_examples(asked, near, config.neighbours), evaluation.crops
    images = read_images(crops, evaluation.train, near.ids.flatten().tolist(), SIDE)
    queries = read_images(crops, val, asked.ids.tolist(), SIDE)
    sheet = draw_sheet(examples, queries, images)
    url = files.join(evaluation.url, SHEET)
    files.write(url, encode_png(sheet))
    events = evaluation.events()
    events.picture("neighbours", sheet, evaluation.source.step or 0)
    events.flush()
    evaluation.terminal.say(f"sheet      {files.redact(url)}")
    if config.points:
        _write_projector(evaluation, Features(*(t[: config.points] for t in found)))


def _spread(samples: int, count: int) -> NDArray[np.int64]:
    """Return `count` evenly spread numbers below `samples` in rising order, or all if fewer."""
    count = min(count, samples)
    return np.arange(count) * samples // count


def _gather(evaluation: Evaluation, found: Features) -> Features:
    """Give each process the features of all processes, ordered by id."""
    whole = Features(*(evaluation.world.all_gather(tensor) for tensor in found))
    order = whole.ids.argsort()
    return Features(*(tensor[order] for tensor in whole))


def _write_projector(evaluation: Evaluation, found: Features) -> None:
    """Write the files that tensorboard's projector reads, beside the evaluations' events."""
    folder = evaluation.curves
    points = len(found.ids)
    columns = int(np.ceil(np.sqrt(points)))
    side = min(SIDE // 2, SPRITE // columns)
    pictures = read_images(evaluation.crops, evaluation.val, found.ids.tolist(), side)
    sprite = np.full((columns * side, columns * side, 3), 255, np.uint8)
    for i, number in enumerate(found.ids.tolist()):
        y, x = (side * place for place in divmod(i, columns))
        sprite[y : y + side, x : x + side] = pictures[number]
    classes = evaluation.val.classes
    names = [
        f"{number}\t{printable(classes[label]) if classes and label >= 0 else ''}"
        for number, label in zip(found.ids.tolist(), found.labels.tolist(), strict=True)
    ]
    rows, width = found.features.shape
    settings = f"""embeddings {{
  tensor_name: "features"
  tensor_path: "features.bytes"
  tensor_shape: {rows}
  tensor_shape: {width}
  metadata_path: "labels.tsv"
  sprite {{
    image_path: "sprite.png"
    single_image_dim: {side}
    single_image_dim: {side}
  }}
}}
"""
    for name, content in (
        ("features.bytes", _bytes(found.features)),
        ("labels.tsv", "\n".join(["id\tclass", *names]).encode()),
        ("sprite.png", encode_png(sprite)),
        ("projector_config.pbtxt", settings.encode()),
    ):
        files.write(files.join(folder, name), content)
    evaluation.terminal.say(f"projector  tensorboard --logdir {quote(folder)}")


def _bytes(features: Tensor) -> bytes:
    content: bytes = features.to("cpu", torch.float32).numpy().astype("<f4").tobytes()
    return content
