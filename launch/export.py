"""Export an encoder: python launch/export.py CHECKPOINT OUT [--option value ...]

CHECKPOINT is the URL of a run (its newest checkpoint is used), of one of its checkpoints, or of a
third-party checkpoint file of a network of torchvision. OUT is the URL of a folder.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

try:
    from launch import imports
except ModuleNotFoundError as error:  # This Python is not the one that the project is installed in.
    sys.exit(f"error: {error}: run `. .venv/bin/activate`, or install it: pip install -e .")

if __name__ == "__main__":  # the imports below would fail with a less helpful message
    imports.begin()

import torch
import tyro
from annotated_types import Interval
from torch import Tensor

from engine.encoder import card
from engine.encoder.classifier import attach, read_head
from engine.encoder.earlier import Folder
from engine.encoder.export import Format
from engine.encoder.source import EncoderConfig, Pixels, Source, open_encoder
from engine.evaluation.examples import read_examples
from engine.evaluation.run_sets import find_val
from engine.log.terminal import Terminal
from engine.processes.world import World, share_of_cores
from launch.help_texts import join_help_lines
from launch.plain_errors import list_options, plain_errors
from shards.errors import InputError, printable
from shards.fields import check_range
from shards.storage import files
from shards.storage.local_files import proposing


@dataclass(frozen=True)
class ExportDataConfig:
    """Real images on which every exported file is compared with the checkpoint."""

    val: str = ""
    """URL of shards, or of a folder of images, that the exported files are compared on. By default
    they are the run's data.val, or its probe.val where it has no data.val, if they can be read."""


@dataclass(frozen=True)
class Export:
    """Write an encoder and its card for torchvision, timm, TorchScript, torch.export or ONNX."""

    checkpoint_url: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """URL of a run, of one of its checkpoints, or of a third-party checkpoint file."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """URL of the folder that is written to. Files of the same weights in other formats stay."""
    format: tuple[Format, ...] = ("safetensors", "state-dict", "torchscript", "torch-export")
    """Formats that are written. onnx needs pip install 'byol-engine[onnx]'."""
    head: str = ""
    """URL of the head.safetensors of a linear evaluation, or of the model.safetensors of a
    fine-tuning. The classifier is then written, which is the encoder with this head."""
    overwrite: bool = False
    """Replace the export of other weights that OUT holds."""
    threads: Annotated[int | None, Interval(ge=1, le=1024)] = None
    """Threads of torch. By default they are the cores that the job may use."""
    encoder: Annotated[EncoderConfig, tyro.conf.arg(name="")] = field(default_factory=EncoderConfig)
    data: ExportDataConfig = field(default_factory=ExportDataConfig)

    def run(self) -> None:
        """Export the encoder. Raises InputError when an argument is wrong."""
        if not self.out.strip():
            raise InputError("OUT is empty: give the URL of a folder")
        files.check(self.out, "OUT")
        files.check_folder(self.out, "OUT")
        if not self.format:
            raise InputError("--format needs at least one format")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("an export is one process: python launch/export.py CHECKPOINT OUT")
        head = read_head(self.head) if self.head else None
        torch.set_num_threads(self.threads or share_of_cores())
        alone, say = World(0, 1, 1, torch.device("cpu")), Terminal(main=True).say
        say(f"opening {files.redact(self.checkpoint_url)}")
        source, encoder = open_encoder(self.checkpoint_url, self.encoder, alone, say)
        if isinstance(encoder, Pixels):
            raise InputError("--network pixels is no encoder: there is nothing to export")
        say(source.report)
        images = card.sample_images(source, self._read_val(source, say))
        classes = head.classes if head else None
        if head:
            encoder = attach(encoder, head, source, self.head)
        folder = Folder(self.out, self.overwrite)
        card.write(source, encoder.eval(), self.format, folder, images, say, classes)

    def _read_val(self, source: Source, say: Callable[[str], None]) -> Tensor | None:
        def read(url: str) -> Tensor:
            return read_examples(url, "data.val", source, card.IMAGES, say)

        if self.data.val:
            return read(self.data.val)
        try:
            if url := find_val(source, say):
                return read(url)
        except (InputError, OSError) as error:
            say(str(error))
        say("compared on random images only: give --data.val URL for real ones")
        return None


def parse(arguments: list[str]) -> Export:
    """Parse the command line. --help prints and exits.

    Raises InputError with one line when the arguments are not understood.
    """
    join_help_lines(Export, arguments)
    try:
        with plain_errors(arguments, lambda: list_options(Export)):
            given = tyro.cli(Export, prog="export.py", args=arguments)
        check_range("--threads", given.threads, Interval(ge=1, le=1024))
        return given
    except InputError as error:
        if not arguments or not arguments[0].startswith("-"):
            raise
        raise InputError(f"{error}; put CHECKPOINT and OUT first") from None


def main(arguments: list[str]) -> int:
    try:
        given = parse(arguments)
        with proposing("choose another OUT", given.out):
            given.run()
    except (InputError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command begins again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    imports.end()
    sys.exit(main(sys.argv[1:]))
