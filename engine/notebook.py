"""Train and look inside from Python, in one process: for notebooks and experiments of one's own."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.utils import make_grid

from engine.data import open_data
from engine.divergence import check_skips
from engine.evaluation.features import encoding
from engine.log.terminal import Terminal
from engine.measuring import describe_step
from engine.method.augment import denormalize
from engine.method.byol import VIEWS
from engine.method.local_shards import whole
from engine.processes.interrupts import interrupts_held
from engine.processes.world import join
from engine.recipe import Recipe
from engine.run import Run, open_run
from engine.trainer import Trainer
from shards.center_crops import CropReader, EvalBatch
from shards.documents import shown
from shards.errors import InputError
from shards.fields import flatten
from shards.index import Index
from shards.loader import Batch
from shards.loader_process import Loader

_MOST_IMAGES = 256  # that go through the encoder at a time
_OPTION = re.compile(r"(?<![\w-])--([a-z][\w.-]*\w)")
Which = Literal["train", "val", "probe.train", "probe.val"]


@contextmanager
def fields_in_messages(recipe: Recipe) -> Iterator[None]:
    """Let an InputError of the block name fields of the recipe, and no options of a command line.

    The parts that raise it are those of launch/train.py, and advise such as "give another --run".
    """
    known = {name.replace("_", "-"): name for name in flatten(recipe)}

    def name_field(option: re.Match[str]) -> str:
        group, _, last = option[1].rpartition(".")
        dot = "." * bool(group)
        if option[1] == "run-url":
            return "recipe.run"
        if (on := f"{group}{dot}{last.removeprefix('no-')}") in known and on != option[1]:
            return f"recipe.{known[on]}=False"
        return f"recipe.{known[option[1]]}" if option[1] in known else option[0]

    try:
        yield
    except InputError as error:
        text = _OPTION.sub(name_field, str(error))
        if text == str(error):
            raise
        raise InputError(f"{text} (dataclasses.replace makes a recipe with other fields)") from None


class Session:
    """A training in this process, which moves when it is told to.

    `trainer` has the networks, the optimizer and the step. A session writes nothing, except for the
    images that `data.draw` asks for, and for those of a folder that `probe.train` or `probe.val`
    names, which are packed into RUN.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.recipe = trainer, trainer.recipe
        self._loader: Loader | None = None
        self._batch: Batch | None = None  # that of the next step, once it is loaded
        self._place = 0  # the step that the next batch belongs to
        self._closed = False
        self._broken = ""  # how a step ended part way
        self._encoder = self.recipe.model.encoder.build(VIEWS, self.recipe.views.size)
        self._wording = partial(fields_in_messages, self.recipe)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads that load images."""
        self._stop_loading()
        self._closed = True

    def step(self) -> dict[str, Any]:
        """Train on the next batch, and return its figures by the keys of metrics.jsonl.

        Speeds and the norms of the update are not among them. An interruption takes effect when the
        step is done.

        Raises InputError at the end of the schedule, when training has diverged, and after a step
        that failed.
        """
        with self._wording():
            return self._step()

    def _step(self) -> dict[str, Any]:
        trainer = self.trainer
        if self._broken:
            raise InputError(f"{self._broken}, so its weights are of no step: open another session")
        if trainer.step >= trainer.total_steps:
            raise InputError(
                f"all {trainer.total_steps} steps of the schedule are done: open a session of a "
                "recipe with more schedule.epochs"
            )
        batch = self._peek()
        with interrupts_held():  # else parts of the step would enter the next one
            try:
                output = trainer.train_step(batch)
            except BaseException as error:
                self._broken = f"step {self._place + 1} ended part way by {type(error).__name__}"
                raise
            self._batch, self._place = None, trainer.step
        check_skips(trainer, output)
        return describe_step(trainer, output, batch)

    def views(self, count: int = 8) -> Tensor:
        """Return both views of images of the next batch as one picture [3, H, W] of uint8.

        Each view is a row of `count` images. The batch is not used up.
        """
        count = _read_count(count)
        with self._wording():
            batch = self._peek()
        views, params = (t[:, :count].flatten(0, 1) for t in (batch.views, batch.params))
        device = self.trainer.device
        seen = self.trainer.augment(views.to(device), params.to(device)).float().cpu()
        grid = make_grid(denormalize(seen).clamp(0, 1), nrow=len(seen) // VIEWS)
        picture: Tensor = (grid * 255).round().to(torch.uint8)
        return picture

    def images(self, count: int, which: Which = "val") -> EvalBatch:
        """Return about `count` images, spread over a data set, as evaluations see them.

        The images are central crops [N, 3, S, S] of uint8, with labels [N] and sample numbers [N].

        Args:
            which: "train" and "val" are data.train and data.val. "probe.train" and "probe.val" are
                the sets that are measured during training. Where data.val is not set, "val" is
                probe.val too.
        """
        recipe, trainer, count = self.recipe, self.trainer, _read_count(count)
        index = self._find_set(which)
        reader = CropReader(
            recipe.views.size,
            recipe.probe.crop,
            trainer.threads,
            recipe.data.corrupt,
            trainer.terminal.report,
            rules=recipe.data.rules,
        )
        with self._wording():
            batches = list(reader.read(index, limit=count))
        return EvalBatch(*(torch.cat(parts)[:count] for parts in zip(*batches, strict=True)))

    def _find_set(self, which: Which) -> Index:
        data, probe = self.trainer.data, self.trainer.probe
        if which not in get_args(Which):
            known = ", ".join(map(repr, get_args(Which)))
            raise InputError(f"which must be one of {known}, not {shown(which)}")
        if which == "train":
            return data.train
        if which == "val" and data.val is not None:
            return data.val
        if which == "val" and not self.recipe.probe.val:
            raise InputError(
                "neither data.val nor probe.val is set: give the recipe one, or ask for "
                "which='train'"
            )
        if probe is None:
            name = "probe.val" if which == "val" else which
            raise InputError(
                f"{name} is not open, because probe.every is 0: give the recipe evaluations, or "
                "ask for which='train'"
            )
        return probe.train if which == "probe.train" else probe.val

    def features(self, images: Tensor) -> Tensor:
        """Compute the features [N, F] of images [N, 3, H, W] of uint8, as evaluations do.

        The online encoder's running statistics are used, and nothing of the training changes.
        """
        good = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4
        if not good or images.shape[1] != 3 or 0 in images.shape[2:]:
            given = _describe(images)
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
        good = isinstance(features, Tensor) and features.dtype == weight.dtype
        if not good or features.shape[-1:] != weight.shape[1:]:
            raise InputError(
                f"features must be {_describe(weight[:0]).replace('[0,', '[N,')}, as `features` "
                f"computes them, not {_describe(features)}"
            )
        return torch.nn.functional.linear(features, weight, bias)

    def _peek(self) -> Batch:
        """Return the batch of the next step, which stays that until the step is done."""
        if self._closed:
            raise InputError("the session is closed: open another one")
        if self._loader is None or self._place != self.trainer.step:  # others may take steps too
            self._stop_loading()
            self._loader, self._place = self.trainer.batches(), self.trainer.step
        if self._batch is None:
            try:
                self._batch = next(self._loader)
            except BaseException:  # a batch that was loaded in part must not be left out
                self._stop_loading()
                raise
        return self._batch

    def _stop_loading(self) -> None:
        if self._loader is not None:
            self._loader.close()
        self._loader = self._batch = None


def _read_count(count: object) -> int:
    try:
        found = index(count)  # type: ignore[arg-type]
    except TypeError:
        found = 0
    if found < 1:
        raise InputError(f"count must be a whole number of at least 1, not {shown(count)}")
    return found


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        return f"a{'n' * (kind[0] in 'aeiouAEIOU')} {kind}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def open_session(recipe: Recipe, *, continue_run: bool = False, compile: bool = False) -> Session:
    """Open the data of a recipe and build its networks, in this process.

    Args:
        continue_run: Start from the newest checkpoint of `recipe.run`, which stays as it is. By
            default the session starts with new networks and does not look at the run.
        compile: Use torch.compile as a training would.

    Raises InputError when the recipe or its data is at fault.
    """
    if not isinstance(recipe, Recipe):
        raise InputError(
            f"recipe takes an engine.Recipe, not {shown(recipe)}: take that of "
            "engine.load_recipe(NAME)"
        )
    for name, value in (("continue_run", continue_run), ("compile", compile)):
        if not isinstance(value, bool):
            raise InputError(f"{name} takes True or False, not {shown(value)}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("a session is one process: start it without torchrun")
    with fields_in_messages(recipe):
        recipe.check()
        recipe = replace(
            recipe, compile=compile, parallel=replace(recipe.parallel, strategy="auto")
        )
        world = join(recipe.threads, distributed=False)
        terminal = Terminal(main=True)
        data = open_data(recipe, world, terminal.say)
        if continue_run:
            run = open_run(recipe, data.train.digest, world, terminal)
        else:
            run = Run(recipe, data.train.digest, world, terminal, found=None)
        return Session(Trainer(recipe, world, data, run))
