"""Train and look inside from Python, in one process: for notebooks and experiments of one's own."""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.utils import make_grid

from engine.data import open_data
from engine.evaluation.features import encoding
from engine.log.terminal import Terminal
from engine.method.augment import denormalize
from engine.method.byol import VIEWS
from engine.method.local_shards import whole
from engine.processes.world import join
from engine.recipe import Recipe
from engine.run import Run, open_run
from engine.trainer import Trainer
from shards.center_crops import CropReader, EvalBatch
from shards.errors import InputError
from shards.loader import Batch, TrainLoader

_MOST_IMAGES = 256  # that go through the encoder at a time


class Session:
    """A training in this process, which moves when it is told to.

    `trainer` has the networks, the optimizer and the step. A session writes nothing, except for the
    images that `data.draw` asks for, and for those of a folder that `probe.train` or `probe.val`
    names, which are packed into RUN.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.recipe = trainer, trainer.recipe
        self._loader: TrainLoader | None = None
        self._batches: Iterator[Batch] = iter(())
        self._closed = False
        self._encoder = self.recipe.model.encoder.build(VIEWS, self.recipe.views.size)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads that load images."""
        if self._loader is not None:
            self._loader.close()
        self._loader, self._batches, self._closed = None, iter(()), True

    def step(self) -> dict[str, Any]:
        """Train on the next batch, and return its figures by the keys of metrics.jsonl.

        Speeds and the norms of the update are not among them.

        Raises InputError at the end of the schedule, and when training has diverged.
        """
        trainer = self.trainer
        if trainer.step >= trainer.total_steps:
            raise InputError(
                f"all {trainer.total_steps} steps of the schedule are done: open a session of a "
                "recipe with more schedule.epochs"
            )
        batch = self._take()
        output = trainer.train_step(batch)
        trainer.check_skips(output)
        return trainer.measure(output, batch)

    def views(self, count: int = 8) -> Tensor:
        """Return both views of images of the next batch as one picture [3, H, W] of uint8.

        Each view is a row of `count` images. The batch is not used up.
        """
        batch = self._take()
        self._batches = chain([batch], self._batches)
        views, params = (t[:, :count].flatten(0, 1) for t in (batch.views, batch.params))
        device = self.trainer.device
        seen = self.trainer.augment(views.to(device), params.to(device)).float().cpu()
        grid = make_grid(denormalize(seen).clamp(0, 1), nrow=len(seen) // VIEWS)
        picture: Tensor = (grid * 255).round().to(torch.uint8)
        return picture

    def images(self, count: int, which: Literal["train", "val"] = "val") -> EvalBatch:
        """Return about `count` images, spread over a data set, as evaluations see them.

        The images are central crops [N, 3, S, S] of uint8, with labels [N] and sample numbers [N].
        """
        recipe, trainer = self.recipe, self.trainer
        if which not in ("train", "val"):
            raise InputError(f"which must be 'train' or 'val', not {which!r}")
        index = trainer.data.train if which == "train" else trainer.data.val
        if index is None:
            raise InputError("data.val is not set: give the recipe one, or ask for which='train'")
        reader = CropReader(
            recipe.views.size,
            recipe.probe.crop,
            trainer.threads,
            recipe.data.corrupt,
            trainer.terminal.report,
            rules=recipe.data.rules,
        )
        batches = list(reader.read(index, limit=count))
        return EvalBatch(*(torch.cat(parts)[:count] for parts in zip(*batches, strict=True)))

    def features(self, images: Tensor) -> Tensor:
        """Compute the features [N, F] of images [N, 3, H, W] of uint8, as evaluations do.

        The online encoder's running statistics are used, and nothing of the training changes.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            given = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise InputError(f"images must be uint8 of shape [N, 3, H, W], not {given}")
        online = self.trainer.online.encoder.state_dict()
        self._encoder.load_state_dict({name: whole(value) for name, value in online.items()})
        encode = encoding(self._encoder, self.recipe.precision, self.trainer.device)
        parts = [encode(part.to(self.trainer.device)) for part in images.split(_MOST_IMAGES)]
        return torch.cat(parts).cpu()

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Compute the online head's logits [N, classes] of features [N, F]."""
        head = self.trainer.online.classifier
        if head is None:
            raise InputError("data.train has no labels, so there is no classifier")
        weight, bias = whole(head.weight).cpu(), whole(head.bias).cpu()
        return torch.nn.functional.linear(features, weight, bias)

    def _take(self) -> Batch:
        if self._closed:
            raise InputError("the session is closed: open another one")
        if self._loader is None:
            self._loader = self.trainer.batches()
            self._batches = iter(self._loader)
        return next(self._batches)


def open_session(recipe: Recipe, *, continue_run: bool = False, compile: bool = False) -> Session:
    """Open the data of a recipe and build its networks, in this process.

    Args:
        continue_run: Start from the newest checkpoint of `recipe.run`, which stays as it is. By
            default the session starts with new networks and does not look at the run.
        compile: Use torch.compile as a training would.

    Raises InputError when the recipe or its data is at fault.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("a session is one process: start it without torchrun")
    recipe.check()
    recipe = replace(recipe, compile=compile, parallel=replace(recipe.parallel, strategy="auto"))
    world = join(recipe.threads, distributed=False)
    terminal = Terminal(main=True)
    data = open_data(recipe, world, terminal.say)
    if continue_run:
        run = open_run(recipe, data.train.digest, world, terminal)
    else:
        run = Run(recipe, data.train.digest, world, terminal, found=None)
    return Session(Trainer(recipe, world, data, run))
