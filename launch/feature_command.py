"""Parse and run launch/evaluate.py features CHECKPOINT DATA OUT."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro
from annotated_types import Interval

from engine.encoder.source import EncoderConfig, open_encoder
from engine.evaluation.feature_extraction import Extraction, FeaturesConfig
from engine.evaluation.feature_parts import choose_output
from engine.evaluation.image_sets import open_images
from engine.log.terminal import Terminal
from engine.method.precision import slow_on
from engine.processes import world
from engine.processes.world import share_of_cores
from shards.errors import InputError
from shards.fields import UnitInterval
from shards.making.convert import PixelOptions
from shards.making.window import check_window
from shards.storage import files

_Flat = tyro.conf.arg(name="")  # its fields become options without a prefix


@dataclass(frozen=True)
class ImagesConfig:
    """Options for the images that features are computed of."""

    corrupt: UnitInterval = 0.01
    """Fraction of the images that each process may find undecodable before it stops. It may always
    find 10. They are left out and listed."""
    max_pixels: Annotated[int | None, Interval(ge=1, le=2**32)] = None
    """Images whose header claims more pixels count as undecodable. By default it is the run's
    data.max_pixels, and 89,478,485 for a third-party file."""
    follow_links: bool = False
    """Also take files outside of a folder of images that links in it lead to."""
    window: tuple[float, float] | None = None
    """LOW HIGH, the values that become black and white in images of more than 8 bits per channel,
    in a folder of images."""
    window_percentiles: tuple[float, float] | None = None
    """LOW HIGH, the percentiles of the values in up to 64 of those images that are taken as the
    window."""


@dataclass(frozen=True)
class Features:
    """Write the features of any images to files, with their names and labels."""

    checkpoint_url: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """URL of a run, of one of its checkpoints, or of a third-party checkpoint file."""
    images: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """URL of shards with an index, or of a plain folder of images."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """URL of one file that ends in .npz, .npy, .safetensors or .parquet, or of a folder for several
    files."""
    protocol: Annotated[FeaturesConfig, _Flat] = field(default_factory=FeaturesConfig)
    data: ImagesConfig = field(default_factory=ImagesConfig)
    encoder: Annotated[EncoderConfig, _Flat] = field(default_factory=EncoderConfig)
    threads: Annotated[int | None, Interval(ge=1, le=1024)] = None
    """Threads of each process, for decoding and for torch on the CPU. By default the
    cores that the job may use are shared out among its processes."""

    def run(self) -> None:
        """Write the features. Raises InputError when an argument is wrong."""
        data = self.data
        check_window("--data.window", data.window, -math.inf, math.inf)
        check_window("--data.window-percentiles", data.window_percentiles, 0, 100)
        if data.window and data.window_percentiles:
            raise InputError("--data.window and --data.window-percentiles exclude each other")
        if not self.images.strip():
            raise InputError("DATA is empty: give the URL of shards or of a folder of images")
        files.check(self.images, "DATA")
        output = choose_output(self.out, self.protocol.format)
        here = world.join(self.threads, False)
        terminal, threads = Terminal(here.main), self.threads or share_of_cores()
        terminal.say(f"opening {files.redact(self.checkpoint_url)}")
        source, network = open_encoder(self.checkpoint_url, self.encoder, here, terminal.say)
        if data.max_pixels is not None:
            source = replace(source, rules=replace(source.rules, max_pixels=data.max_pixels))
        terminal.say(f"features: {source.report}")
        if warning := slow_on(here.device, source.precision):
            terminal.say(warning)
        terminal.say(f"looking for images in {files.redact(self.images)}")
        images = here.on_all(
            lambda: open_images(
                self.images,
                source.rules,
                PixelOptions(source.rules.max_pixels, window=data.window),
                data.window_percentiles,
                follow_links=data.follow_links,
                threads=threads,
                report=terminal.report,
            )
        )
        world.check_alike(here, {"DATA": images.digest})
        terminal.say(f"{images.samples:,} images")
        Extraction(
            source,
            network,
            images,
            self.protocol,
            output,
            here,
            terminal,
            threads=threads,
            corrupt=data.corrupt,
        ).run()
