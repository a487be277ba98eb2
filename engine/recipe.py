"""A recipe: one complete, typed description of a run, composed of the modules' own configs.

A recipe file defines a variable `recipe`. The command line overrides single fields by their dotted
names. recipe.json, commit.json and all messages use the same names.
"""

import difflib
import math
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from fractions import Fraction
from functools import partial
from inspect import signature
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import tyro
from annotated_types import Interval

from engine import recipe_files
from engine.evaluation.during_training import ProbeConfig
from engine.log.metrics import LogConfig
from engine.log.profiling import parse_steps
from engine.method.adamw import AdamWConfig
from engine.method.average import AverageConfig
from engine.method.byol import BYOLConfig
from engine.method.clipping import ClipConfig
from engine.method.durations import parse, to_steps
from engine.method.lars import LARSConfig
from engine.method.precision import Precision
from engine.method.schedule import ScheduleConfig
from engine.method.sgd import SGDConfig
from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.processes.parallel import ParallelConfig
from engine.state import best, layout, origin
from engine.state.checkpoint import CheckpointConfig
from engine.state.early_stop import EarlyStopConfig
from shards.errors import InputError
from shards.field_types import check_types
from shards.fields import OPERATION, Operation, check_bounds, check_range, flatten, walk
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.storage import files
from shards.views import ViewsConfig

# The machines of a run may differ in these fields, and must agree on all others.
_MACHINES_OWN = {
    *("run", "data.train", "data.val", "data.prefetch", "data.cache", "data.cache_gb"),
    *("probe.train", "probe.val"),
    *(
        "threads",
        "compile",
        "compile_folder",
        "cuda_graph",
        "log.visdom",
        "log.wandb",
        "data.own_process",
    ),
}

# The method fields that came after the first release, with the values that runs had before them.
ADDED_LATER: dict[str, Any] = {
    **{"data.max_pixels": 89_478_485, "data.exif": "ignore"},
    **{"probe.head_lr": None, "schedule.rewarm": 0, "schedule.lr_decay": "cosine"},
    **{"clip.norm": 0.0, "clip.value": 0.0},
    **{"model.initialization": "official", "model.target_start": "drawn", "average.rate": 0.0},
    "model.last_gamma": "zero",
    "data.decode": "cpu",
    "model.encoder": "ResNetConfig",
}

# The warm-up was a number of epochs before it could also be one of steps.
WARMUP_BEFORE, WARMUP = "schedule.warmup_epochs", "schedule.warmup"


@dataclass(frozen=True)
class Recipe:
    """Describe a run completely, except for the content of its data sets.

    The defaults are the official method's.
    """

    # torchrun takes --run for an abbreviation of its own --run-path, even after the script.
    run: Annotated[Operation[str], tyro.conf.arg(aliases=["--run-url"])] = ""
    """URL of the run's directory, for checkpoints, metrics and tensorboard. It is made when it is
    not there. Under torchrun write --run-url."""
    seed: Annotated[int, Interval(ge=0, le=2**62)] = 0
    """Seed of the initial weights, the order of the data and all random views."""
    steps: Operation[Annotated[int | None, Interval(ge=0)]] = None
    """Stop after this step of the run. No schedule depends on it. By default the run is trained to
    its end."""
    threads: Operation[Annotated[int | None, Interval(ge=1, le=1024)]] = None
    """Threads of each process, for decoding and for torch on the CPU. By default the
    cores that the job may use are shared out among its processes."""
    compile: Operation[bool] = True
    """Compile the networks, the losses, the moving average and, on a GPU, the augmentation with
    torch.compile. The first step then takes minutes."""
    compile_artefacts: Operation[bool] = True
    """Keep what torch.compile makes in the folder RUN/compile, so that the next start need not
    compile again."""
    compile_folder: Operation[str] = ""
    """Local folder that is used instead of RUN/compile, and that runs may share. Whoever can write
    there can run code in the next start."""
    cuda_graph: Operation[bool] = False
    """Start all kernels of a training step by one call, except in logged steps. That is faster
    where the GPU waits for its host, as for small images. It is for one GPU, and takes the memory
    of a step twice. The recorded step is first compared with an ordinary one."""
    precision: Precision = "fp32"
    """Number format of the forward passes. fp32, bf16 and fp16 keep the parameters in float32, and
    fp16 scales the loss. fp64 computes everything in float64, for verification."""
    profile: Operation[str] = ""
    """Steps FIRST:LAST, such as 10:12, that the first process profiles. The trace and a table of
    the most expensive operations go to RUN/profile."""
    debug_step: Operation[bool] = False
    """Take one batch through training, evaluation and checkpoint, report what was seen, and
    stop."""
    explain: Operation[bool] = False
    """Print what the run will take, such as memory, time, requests and checkpoints, and stop.
    Nothing is trained, fetched or written."""
    explain_processes: Operation[Annotated[int | None, Interval(ge=1, le=2**20)]] = None
    """Number of processes that --explain takes, one for each GPU. By default it takes those that it
    was started with."""
    explain_images: Operation[Annotated[int | None, Interval(ge=1, le=2**40)]] = None
    """Number of training images that --explain takes, without looking at data.train, which then
    need not be there. By default it takes those that are there."""
    explain_speed: Operation[Annotated[float | None, Interval(gt=0, le=1e9)]] = None
    """Images a second of each process that --explain takes. By default it takes the speed that the
    run's log has."""
    replay: Operation[Annotated[int | None, Interval(ge=1)]] = None
    """Take the batch of this step again, show its views, losses and gradients in the folder
    RUN/replay, and stop. The run is not changed."""
    replay_forward: Operation[Annotated[int, Interval(ge=0)]] = 200
    """Most steps that --replay trains to get from the nearest checkpoint to its step. If there are
    more, it takes the checkpoint's weights as they are."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    model: BYOLConfig = field(default_factory=BYOLConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: LARSConfig | AdamWConfig | SGDConfig | TorchOptimizerConfig = field(
        default_factory=LARSConfig
    )
    clip: ClipConfig = field(default_factory=ClipConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    log: LogConfig = field(default_factory=LogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def check(self) -> None:
        """Raise InputError, naming the field, when a value is wrong or fields conflict."""
        check_types(self)
        check_bounds(self)
        self.model.encoder.check_size(self.views.size)
        # Batch norm needs at least two rows.
        check_range("batch.micro", self.batch.micro, Interval(ge=1, le=self.batch.size // 2))
        warmup, unit = parse(self.schedule.warmup)
        if unit == "epoch" and warmup > self.schedule.epochs:
            raise InputError(
                f"schedule.warmup must be at most schedule.epochs {self.schedule.epochs:g}, not "
                f"{self.schedule.warmup}: give a shorter --schedule.warmup"
            )
        for name, option, what in (
            ("run", "run-url", "directory to write to"),
            ("data.train", "data.train", "folder of shards"),
        ):
            needed = name == "run" or not (self.explain and self.explain_images)
            if needed and not attrgetter(name)(self).strip():
                raise InputError(f"{name} is not set: give --{option} URL, the {what}")
        places = ("run", "data.train", "data.val", "data.cache", "probe.train", "probe.val")
        beginnings = ("checkpoint.resume", "checkpoint.branch", "model.start")
        for name in (*places, *beginnings, "compile_folder"):
            files.check(attrgetter(name)(self), name)
        layout.check_run(self.run)
        files.check_folder(self.data.cache, "data.cache")
        files.check_folder(self.compile_folder, "compile_folder")
        parse_steps(self.profile)
        self._check_figures()
        self._check_optimizer()
        self._check_beginning()
        if not files.is_local(self.compile_folder):
            raise InputError(
                f"compile_folder {files.redact(self.compile_folder)}: must be on a local disk, "
                "because what lies there is run: give a path, or leave it out for RUN/compile"
            )

    def figures(self) -> dict[str, str]:
        """Return the figures of the log that decide something, by the fields that name them."""
        found = {"checkpoint.keep_best": self.checkpoint.keep_best}
        return found | {"early_stop.key": self.early_stop.key}

    def _check_figures(self) -> None:
        self.early_stop.check()
        if key := self.checkpoint.keep_best:
            best.check_key(key, "checkpoint.keep_best")
        for name, key in self.figures().items():
            if key in best.MEASURED and not self.probe.every:
                raise InputError(
                    f"{name} {key} is measured at evaluations: turn them on with --probe.every N"
                )

    def _check_optimizer(self) -> None:
        if isinstance(self.optimizer, SGDConfig):
            self.optimizer.check()
        elif isinstance(self.optimizer, TorchOptimizerConfig):
            self.optimizer.check(spread=self.parallel.strategy in ("fsdp", "hsdp"))

    def _check_beginning(self) -> None:
        branch, start = self.checkpoint.branch, self.model.start
        if branch and self.checkpoint.resume:
            raise InputError(
                f"checkpoint.resume {files.redact(self.checkpoint.resume)} and checkpoint.branch "
                f"{files.redact(branch)} exclude each other: give one of them"
            )
        if branch and origin.names_same(self.run, origin.home(branch)):
            raise InputError(
                f"checkpoint.branch {files.redact(branch)}: is of the run itself: give another "
                "--run-url, where the branch goes"
            )
        if self.model.start_prefix is not None and not start:
            raise InputError("model.start_prefix is for model.start: give --model.start URL too")


def in_steps(recipe: Recipe, steps_per_epoch: int) -> Recipe:
    """Return a recipe in which all that happens now and then is due by steps alone."""
    every = partial(to_steps, steps_per_epoch=steps_per_epoch)
    saves, log = recipe.checkpoint, recipe.log
    return replace(
        recipe,
        probe=replace(recipe.probe, every=every(recipe.probe.every)),
        checkpoint=replace(saves, every=every(saves.every), keep_every=every(saves.keep_every)),
        log=replace(log, every=every(log.every), ranks_every=every(log.ranks_every)),
    )


def shared_fields(recipe: Recipe) -> dict[str, Any]:
    """Return what all processes of a run must agree on: fields, and which sets they have."""
    fields = flatten(recipe)
    sets = {f"{k} is set": bool(fields[k]) for k in ("data.val", "probe.train", "probe.val")}
    return {k: v for k, v in fields.items() if k not in _MACHINES_OWN} | sets


def method_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that must match to resume, by dotted name, with tuples as JSON lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value, annotations in walk(recipe)
        if OPERATION not in annotations
    }


def in_todays_terms(method: dict[str, Any]) -> dict[str, Any]:
    """Return the method fields that an earlier version wrote as this version would write them."""
    found = ADDED_LATER | method
    epochs = found.get(WARMUP_BEFORE)
    if isinstance(epochs, int | float) and math.isfinite(epochs) and WARMUP not in found:
        found[WARMUP] = ScheduleConfig(warmup=f"{Fraction(repr(epochs))} epochs").warmup
        del found[WARMUP_BEFORE]
    return found


def optimizers() -> tuple[type[Any], ...]:
    """Return the config classes of the optimizers that a recipe can have."""
    return get_args(get_type_hints(Recipe)["optimizer"])


def operation_names() -> list[str]:
    """Return the dotted names of the fields that may change at every start."""
    return [name for name, _, annotations in walk(Recipe()) if OPERATION in annotations]


class RecipeFile(NamedTuple):
    """Hold what a recipe file defines."""

    path: str
    recipe: Recipe
    recipe_for: Callable[..., object] | None
    """Makes the recipe for a number of training images. Most files define none."""

    def for_images(self, images: int, epochs: float | None = None) -> Recipe:
        """Return the recipe for a number of training images.

        A number of `epochs` that is not the recipe's own is told to a function that takes it.

        Raises InputError when the file's function fails or makes none.
        """
        if self.recipe_for is None:
            return self.recipe
        with recipe_files.running(self.path, _explain):
            takes = epochs is not None and "epochs" in signature(self.recipe_for).parameters
            found = self.recipe_for(images, epochs=epochs) if takes else self.recipe_for(images)
        return _checked(found, self.path, "recipe_for returns no")


def load(path: str | Path) -> Recipe:
    """Load `recipe` from a recipe file, or from a shipped one by its bare name.

    Raises InputError when there is no such file, when it fails to run, when it defines no recipe,
    and when a field of it has a value of the wrong type.
    """
    return load_file(path).recipe


def load_file(path: str | Path) -> RecipeFile:
    """Load what a recipe file defines. It raises InputError as `load` does."""
    path = recipe_files.find(path)
    with recipe_files.running(path, _explain):
        found = runpy.run_path(path)
    recipe_for = found.get("recipe_for")
    recipe = _checked(found.get("recipe"), path, "defines no `recipe` that is an")
    return RecipeFile(path, recipe, recipe_for if callable(recipe_for) else None)


def _checked(found: object, path: str, fault: str) -> Recipe:
    if type(found) is not Recipe:
        derived = " itself, but one of a class derived from it" * isinstance(found, Recipe)
        raise InputError(f"{path}: {fault} engine.recipe.Recipe{derived}")
    try:
        check_types(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return found


def _explain(error: BaseException) -> str:
    """Say what is wrong where a config was given a field that it does not have, or lacks one."""
    kinds = {kind.__name__: [entry.name for entry in fields(kind)] for kind in _configs(Recipe)}
    text = str(error) if isinstance(error, TypeError) else ""
    if found := re.search(r"(\w+)\.__init__\(\) missing \d+ required .*?: (.*)", text):
        return f"{found[1]} needs {found[2]}" if found[1] in kinds else ""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if found is None or found[1] not in kinds:
        return ""
    kind, name = found[1], found[2]
    near = difflib.get_close_matches(name, kinds[kind], n=1)
    others = sorted(other for other, known in kinds.items() if name in known)
    advice = f"it has {', '.join(kinds[kind])}"
    if name == WARMUP_BEFORE.rpartition(".")[2]:
        advice = "write warmup='10 epochs', because a bare number counts steps"
    elif others:
        advice = f"it is one of {' and '.join(others)}"
    elif near:
        advice = f"did you mean {near[0]}?"
    return f"{kind} has no field {name}: {advice}"


def _configs(kind: Any) -> set[Any]:
    """Return the config classes that a type hint is made of, and those of their fields."""
    nested = [one for hint in get_args(kind) for one in _configs(hint)]
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        nested = [kind, *(one for entry in fields(kind) for one in _configs(hints[entry.name]))]
    return set(nested)
