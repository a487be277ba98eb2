"""Measure an encoder: python launch/evaluate.py PROTOCOL CHECKPOINT [--option value ...]

CHECKPOINT is the URL of a run (its newest checkpoint is used), of one of its checkpoints, or of a
third-party checkpoint file of a network of torchvision. For several processes use torchrun
launch/evaluate.py ...

The commands `report RUN` and `runs URL` measure nothing. They show what runs have written.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

try:
    from launch import imports
except ModuleNotFoundError as error:  # This Python is not the one that the project is installed in.
    sys.exit(f"error: {error}: run `. .venv/bin/activate`, or install it: pip install -e .")

if __name__ == "__main__":  # the imports below would fail with a less helpful message
    imports.begin()

import tyro
from annotated_types import Interval

from engine.encoder.source import EncoderConfig
from engine.evaluation import finetune, knn, linear, logistic, neighbours
from engine.evaluation.finetune import FinetuneConfig
from engine.evaluation.knn import KNNConfig
from engine.evaluation.linear import LinearConfig
from engine.evaluation.logistic import LogisticConfig
from engine.evaluation.neighbours import NeighboursConfig
from engine.evaluation.results import Result
from engine.evaluation.semi_supervised import SemiSupervisedConfig, take_labels
from engine.evaluation.session import Evaluation, EvaluationDataConfig
from engine.log.terminal import flush_output
from engine.processes import world
from engine.processes.failures import report_failure
from engine.processes.launcher import rank
from launch.feature_command import Features
from launch.help_texts import join_help_lines
from launch.plain_errors import list_options, plain_errors, propose
from launch.reports import Report, Runs
from shards.errors import InputError
from shards.fields import as_flag, check_bounds
from shards.storage.local_files import proposing

_Flat = tyro.conf.arg(name="")  # its fields become options without a prefix
_FLAT_PREFIXES = r"^((options|protocol|subset|encoder)\.)*"


@dataclass(frozen=True)
class Options:
    """Options of every protocol."""

    checkpoint_url: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """URL of a run, of one of its checkpoints, or of a third-party checkpoint file."""
    data: EvaluationDataConfig = field(default_factory=EvaluationDataConfig)
    encoder: Annotated[EncoderConfig, _Flat] = field(default_factory=EncoderConfig)
    out: str = ""
    """URL of a folder for the results; the run is then left alone. By default they go to
    RUN/evaluations and into the run's metrics and tensorboard, and for a third-party file to the
    folder evaluations."""
    threads: Annotated[int | None, Interval(ge=1, le=1024)] = None
    """Threads of each process, for decoding and for torch on the CPU. By default the
    cores that the job may use are shared out among its processes."""

    def open(self, protocol: str, settings: dict[str, Any], labels: bool = True) -> Evaluation:
        here = world.join(self.threads, False)
        return Evaluation(
            protocol,
            self.checkpoint_url,
            self.encoder,
            self.data,
            settings,
            here,
            out=self.out,
            threads=self.threads,
            labels=labels,
        )


@dataclass(frozen=True)
class Linear:
    """Train a linear classifier on the frozen features. This is the paper's protocol."""

    options: Annotated[Options, _Flat]
    protocol: Annotated[LinearConfig, _Flat] = field(default_factory=LinearConfig)

    def run(self) -> None:
        evaluation = self.options.open("linear", self.protocol.settings())
        _measure(evaluation, lambda: linear.evaluate(evaluation, self.protocol))


@dataclass(frozen=True)
class Logistic:
    """Fit a regularized logistic regression, the paper's way to measure transfer to other data."""

    options: Annotated[Options, _Flat]
    protocol: Annotated[LogisticConfig, _Flat] = field(default_factory=LogisticConfig)

    def run(self) -> None:
        evaluation = self.options.open("logistic", self.protocol.settings())
        _measure(evaluation, lambda: logistic.evaluate(evaluation, self.protocol))


@dataclass(frozen=True)
class KNN:
    """Classify by the vote of the k nearest training images, for several k and temperatures."""

    options: Annotated[Options, _Flat]
    protocol: Annotated[KNNConfig, _Flat] = field(default_factory=KNNConfig)

    def run(self) -> None:
        evaluation = self.options.open("knn", self.protocol.settings())
        _measure(evaluation, lambda: knn.evaluate(evaluation, self.protocol))


@dataclass(frozen=True)
class Finetune:
    """Train encoder and classifier together on all labels."""

    options: Annotated[Options, _Flat]
    protocol: Annotated[FinetuneConfig, _Flat] = field(default_factory=FinetuneConfig)

    def run(self) -> None:
        evaluation = self.options.open("finetune", self.protocol.settings())
        split = finetune.take_all_labels(evaluation, self.protocol)
        _measure(evaluation, lambda: finetune.evaluate(evaluation, self.protocol, split))


@dataclass(frozen=True)
class SemiSupervised:
    """Train encoder and classifier together on a few labels of each class."""

    options: Annotated[Options, _Flat]
    subset: Annotated[SemiSupervisedConfig, _Flat] = field(default_factory=SemiSupervisedConfig)
    protocol: Annotated[FinetuneConfig, _Flat] = field(default_factory=FinetuneConfig)

    def run(self) -> None:
        self.subset.check()
        name = f"semi-supervised-{'files' if self.subset.files else f'{self.subset.fraction:g}'}"
        settings = self.subset.settings() | self.protocol.settings()
        evaluation = self.options.open(name, settings)

        def measure() -> Result | None:
            split = take_labels(evaluation, self.subset, self.protocol)
            return finetune.evaluate(evaluation, self.protocol, split)

        _measure(evaluation, measure)


@dataclass(frozen=True)
class Neighbours:
    """Draw images beside their nearest neighbors, and fill tensorboard's projector."""

    options: Annotated[Options, _Flat]
    protocol: Annotated[NeighboursConfig, _Flat] = field(default_factory=NeighboursConfig)

    def run(self) -> None:
        evaluation = self.options.open("neighbours", self.protocol.settings(), labels=False)
        with evaluation.hold_folder():  # before the features are computed
            neighbours.draw(evaluation, self.protocol)


def _measure(evaluation: Evaluation, measure: Callable[[], Result | None]) -> None:
    """Show the existing result of this evaluation, or measure and publish a new one."""
    if evaluation.find_earlier() is not None:
        return
    with evaluation.hold_folder():
        if (result := measure()) is not None:
            evaluation.publish(result)


Measurement = Linear | Logistic | KNN | Finetune | SemiSupervised | Neighbours
Protocol = Measurement | Features | Report | Runs
_PROTOCOLS: dict[str, type[Protocol]] = {
    "linear": Linear,
    "logistic": Logistic,
    "knn": KNN,
    "finetune": Finetune,
    "semi-supervised": SemiSupervised,
    "neighbours": Neighbours,
    "features": Features,
    "report": Report,
    "runs": Runs,
}


def parse(arguments: list[str]) -> Protocol:
    """Parse the command line. --help prints and exits.

    Raises InputError with one line when the arguments are not understood.
    """
    chosen = _PROTOCOLS.get(arguments[0]) if arguments else None
    if chosen is None and not {"-h", "--help"} & set(arguments[:1]):
        near = propose(arguments[0], list(_PROTOCOLS)) if arguments else ""
        raise InputError(
            f"unknown PROTOCOL {arguments[0]!r}: {near}"
            if near
            else "usage: launch/evaluate.py PROTOCOL CHECKPOINT [--option value ...]; PROTOCOL is "
            f"one of {', '.join(_PROTOCOLS)}, and PROTOCOL --help lists its options"
        )
    if chosen is None:
        print(__doc__, "\nPROTOCOL, each with its own --help:", sep="")
        for name, protocol in _PROTOCOLS.items():
            print(f"  {name:<16} {protocol.__doc__}")
        sys.exit(0)
    join_help_lines(chosen, arguments)
    try:
        with plain_errors(arguments[1:], lambda: list_options(chosen)):
            given: Protocol = tyro.cli(
                chosen, prog=f"evaluate.py {arguments[0]}", args=arguments[1:]
            )
    except InputError as error:
        if not arguments[1:] or not arguments[1].startswith("-"):
            raise
        # An option that takes several values may have taken CHECKPOINT as one of them.
        raise InputError(f"{error}; put CHECKPOINT right behind {arguments[0]}") from None
    check_bounds(given, lambda name: as_flag(re.sub(_FLAT_PREFIXES, "", name)))
    return given


def _remedy(given: Protocol) -> str:
    """Return what helps where results may not be written."""
    if isinstance(given, Features):
        return "choose another OUT"
    if isinstance(given, Runs):
        return ""  # It writes nothing.
    out = given.out if isinstance(given, Report) else given.options.out
    what = "file" if isinstance(given, Report) else "folder"
    return "give another --out" if out else f"give --out, a {what} elsewhere"


def main(arguments: list[str]) -> int:
    try:
        given = parse(arguments)
        with proposing(_remedy(given)):
            given.run()
        world.leave()
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted: the same command goes on from what is saved", file=sys.stderr)
        return 130
    except Exception as error:
        report_failure(error)
        return 1
    return 0


if __name__ == "__main__":
    imports.end()
    status = main(sys.argv[1:])
    flush_output()
    if status:
        # Python's normal exit could wait for processes that wait for this one.
        os._exit(status)
