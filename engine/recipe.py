"""A recipe: one complete, typed description of a run, composed of the modules' own configs.

A recipe file defines a variable `recipe`. The command line overrides single fields by their dotted
names. recipe.json, commit.json and all messages use the same names.
"""

import runpy
import traceback
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import tyro
from annotated_types import Interval

from engine.evaluation.during_training import ProbeConfig
from engine.log.metrics import LogConfig
from engine.log.profiling import parse_steps
from engine.method.adamw import AdamWConfig
from engine.method.byol import BYOLConfig
from engine.method.lars import LARSConfig
from engine.method.precision import Precision
from engine.method.schedule import ScheduleConfig
from engine.processes.parallel import ParallelConfig
from engine.state import layout
from engine.state.checkpoint import CheckpointConfig
from shards.errors import InputError
from shards.fields import OPERATION, Operation, check_bounds, check_range, flatten, walk
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.storage import files
from shards.views import ViewsConfig

# The machines of a run may differ in these fields, and must agree on all others.
_MACHINES_OWN = {
    *("run", "data.train", "data.val", "data.prefetch", "data.cache", "data.cache_gb"),
    *("threads", "compile", "compile_folder"),
}

# The method fields that came after the first release, with the values that runs had before them.
ADDED_LATER: dict[str, Any] = {"data.max_pixels": 89_478_485, "data.exif": "ignore"}


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
    """Compile the networks, LARS, the moving average and, on a GPU, the augmentation with
    torch.compile. The first step then takes minutes."""
    compile_artefacts: Operation[bool] = True
    """Keep what torch.compile makes in the folder RUN/compile, so that the next start need not
    compile again."""
    compile_folder: Operation[str] = ""
    """Local folder that is used instead of RUN/compile, and that runs may share. Whoever can write
    there can run code in the next start."""
    precision: Precision = "fp32"
    """Number format of the forward passes. fp32, bf16 and fp16 keep the parameters in float32, and
    fp16 scales the loss. fp64 computes everything in float64, for verification."""
    profile: Operation[str] = ""
    """Steps FIRST:LAST, such as 10:12, that the first process profiles. The trace and a table of
    the most expensive operations go to RUN/profile."""
    debug_step: Operation[bool] = False
    """Take one batch through training, evaluation and checkpoint, report what was seen, and
    stop."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    model: BYOLConfig = field(default_factory=BYOLConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: LARSConfig | AdamWConfig = field(default_factory=LARSConfig)
    data: DataConfig = field(default_factory=DataConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def check(self) -> None:
        """Raise InputError, naming the field, when a value is out of bounds or fields conflict."""
        check_bounds(self)
        least = 32 if self.model.encoder.stem == "imagenet" else 8
        check_range("views.size", self.views.size, Interval(ge=least, le=2**12))
        # Batch norm needs at least two rows.
        check_range("batch.micro", self.batch.micro, Interval(ge=1, le=self.batch.size // 2))
        warmup = Interval(ge=0, le=self.schedule.epochs)
        check_range("schedule.warmup_epochs", self.schedule.warmup_epochs, warmup)
        for name, what in (
            ("run", "directory to write to (under torchrun: --run-url)"),
            ("data.train", "folder of shards"),
        ):
            if not attrgetter(name)(self).strip():
                raise InputError(f"{name} is not set: give --{name} URL, the {what}")
        for name in ("run", "data.train", "data.val", "data.cache", "checkpoint.resume"):
            files.check(attrgetter(name)(self), name)
        layout.check_run(self.run)
        parse_steps(self.profile)
        if not files.is_local(self.compile_folder):
            raise InputError(
                f"compile_folder {files.redact(self.compile_folder)}: must be on a local disk, "
                "because what lies there is run: give a path, or leave it out for RUN/compile"
            )
        if (self.probe.every or self.probe.baseline) and not self.data.val:
            raise InputError(
                "evaluations are on but data.val is not set: give --data.val URL, or turn them off "
                "with --probe.every 0 --probe.no-baseline"
            )


def shared_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that all processes of a run must agree on, by dotted name."""
    return {k: v for k, v in flatten(recipe).items() if k not in _MACHINES_OWN}


def method_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that must match to resume, by dotted name, with tuples as JSON lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value, annotations in walk(recipe)
        if OPERATION not in annotations
    }


def operation_names() -> list[str]:
    """Return the dotted names of the fields that may change at every start."""
    return [name for name, _, annotations in walk(Recipe()) if OPERATION in annotations]


def load(path: str) -> Recipe:
    """Load `recipe` from a recipe file. Raises InputError when it fails to run or has none."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such recipe file")
    try:
        found = runpy.run_path(path).get("recipe")
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}, line {line}: {reason}") from None
    if not isinstance(found, Recipe):
        raise InputError(f"{path}: defines no `recipe` that is an engine.recipe.Recipe")
    return found
