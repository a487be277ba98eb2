"""A recipe: one complete, typed description of a run, composed of the modules' own configs.

Recipe files define `recipe`; the command line overrides single fields by their dotted names, and
those names are also what recipe.json, commit.json and every message use.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import runpy
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from engine.byol import BYOLConfig
from engine.checkpoint import CheckpointConfig
from engine.lars import AdamWConfig, LARSConfig
from engine.metrics import LogConfig
from engine.parallel import ParallelConfig
from engine.precision import Precision
from engine.probe import ProbeConfig
from engine.schedule import ScheduleConfig
from shards.errors import InputError
from shards.fields import OPERATION, Operation
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.views import ViewsConfig


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is, but its data's bytes. The defaults are the official method's."""

    run: Operation[str] = ""
    """URL of the run's directory: checkpoints, metrics, tensorboard. Made when it is not there."""
    seed: int = 0
    """Decides the initial weights, the order of the data and every random view."""
    steps: Operation[int | None] = None
    """Stop this process after that step; never changes a schedule. None: train to the end."""
    threads: Operation[int] = os.cpu_count() or 1
    """Threads of this process, for decoding and for torch on the CPU."""
    compile: Operation[bool] = True
    """Compile the networks with torch.compile."""
    precision: Precision = "fp32"
    """Of the forward passes; parameters are float32. fp64 computes all in float64, to verify."""
    debug_step: Operation[bool] = False
    """Take one batch through training, evaluation and checkpoint, report, and stop."""
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
        """Raise InputError, naming the field, for what no single config can see or forbid."""
        least = 32 if self.model.encoder.stem == "imagenet" else 8
        positive = {"batch.size": self.batch.size, "batch.micro": self.batch.micro}
        positive |= {"data.streams": self.data.streams, "threads": self.threads}
        positive |= {"log.every": self.log.every, "probe.neighbours": self.probe.neighbours}
        positive |= {"probe.bank": self.probe.bank, "checkpoint.keep": self.checkpoint.keep}
        for name, value in positive.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if not self.run:
            raise InputError("run is not set: give --run URL, the directory to write to")
        if not self.data.train:
            raise InputError("data.train is not set: give --data.train URL, a folder of shards")
        if self.views.size < least:
            raise InputError(
                f"views.size {self.views.size} is too small for the "
                f"{self.model.encoder.stem} stem: use at least {least}"
            )
        if self.schedule.epochs <= 0 or self.schedule.warmup_epochs < 0:
            raise InputError("schedule.epochs must be positive and warmup_epochs not negative")
        if self.schedule.warmup_epochs > self.schedule.epochs:
            raise InputError(
                f"schedule.warmup_epochs {self.schedule.warmup_epochs} is longer than "
                f"schedule.epochs {self.schedule.epochs}"
            )
        if self.probe.every and not self.data.val:
            raise InputError(
                "probe.every is set but data.val is not: give --data.val URL or --probe.every 0"
            )
        if self.steps is not None and self.steps < 0:
            raise InputError(f"steps must not be negative, not {self.steps}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of a config's fields; a field that is one of several config classes
    also stands there itself, with its class's name."""
    return {name: value for name, value, _ in _walk(config, prefix)}


def method_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that must match to resume, as `flatten`, in the form that JSON gives back."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value, operation in _walk(recipe)
        if not operation
    }


def operation_names() -> list[str]:
    """The names of the fields that are free to change at every start."""
    return [name for name, _, operation in _walk(Recipe()) if operation]


def _walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    hints = get_type_hints(type(config), include_extras=True)
    for entry in dataclasses.fields(config):
        value, hint, name = getattr(config, entry.name), hints[entry.name], prefix + entry.name
        if not dataclasses.is_dataclass(value):
            yield name, value, get_origin(hint) is Annotated and OPERATION in get_args(hint)
            continue
        if not dataclasses.is_dataclass(hint):  # a union: which class it is belongs to the value
            yield name, type(value).__name__, False
        yield from _walk(value, name + ".")


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """`name: there -> here` for every method field that two recipes do not share."""
    names = sorted(there.keys() | here.keys())
    return [
        f"{name}: there {there.get(name, 'absent')}, here {here.get(name, 'absent')}"
        for name in names
        if there.get(name) != here.get(name)
    ]


def load(path: str) -> Recipe:
    """The `recipe` of a recipe file. Raises InputError when it can't be read or has none."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such recipe file")
    try:
        found = runpy.run_path(path).get("recipe")
    except InputError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        raise InputError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    if not isinstance(found, Recipe):
        raise InputError(f"{path}: defines no `recipe` that is an engine.recipe.Recipe")
    return found


def parse(arguments: list[str]) -> Recipe:
    """RECIPE [--field.name value ...] -> the complete recipe, checked.

    Raises InputError in one line for an unknown field or a bad value; --help exits.
    """
    if not arguments or arguments[0].startswith("-"):
        raise InputError(
            "usage: torchrun launch/train.py RECIPE [--field.name value ...]; RECIPE is a file "
            "like recipes/quickstart.py, and RECIPE --help lists its fields"
        )
    base = load(arguments[0])
    description = (
        f"{arguments[0]}: fields and what this recipe sets them to. A run resumes only with equal "
        f"method fields; free to change at every start are: {', '.join(operation_names())}."
    )
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            recipe, unknown = tyro.cli(
                Recipe,
                prog=f"train.py {arguments[0]}",
                description=description,
                args=arguments[1:],
                default=base,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(messages.getvalue())) from None
    except ValueError as error:  # from a config's own check
        raise InputError(str(error)) from None
    if unknown:
        raise InputError(_unknown(unknown[0], recipe))
    recipe.check()
    return recipe


def _unknown(argument: str, recipe: Recipe) -> str:
    name = argument.lstrip("-").split("=")[0]
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}: fields are given as --field.name value"
    names = [known.replace("_", "-") for known in flatten(recipe)]
    near = difflib.get_close_matches(name.replace("_", "-"), names, n=1)
    hint = f"did you mean --{near[0]}?" if near else "--help lists the fields"
    return f"unknown field --{name}: {hint}"


def _one_line(message: str) -> str:
    """tyro's framed error as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", message)
    text = " ".join(re.sub(r"[│╭╮╰╯─]+", " ", text).split())
    text = re.sub(r"^(Value error|Parsing error|Missing value) ", "", text)
    return re.split(r" (?:Argument|For full) helptext", text)[0]
