"""Compute the features of any images, and write them with names and labels to one file or many.

The images are cut into parts of consecutive ones, and each process computes every n-th part. What
a part holds does not depend on the number of processes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.encoder.preprocessing import Transform
from engine.encoder.source import Network, Source
from engine.evaluation.feature_files import Format, Header, Rows, as_text
from engine.evaluation.feature_parts import Fault, Output, Parts
from engine.evaluation.features import encoding
from engine.evaluation.image_sets import Images, load
from engine.log.progress import Progress, show_progress
from engine.log.terminal import Terminal
from engine.method.resnet import ResNet
from engine.method.torchvision_encoder import TorchvisionEncoder
from engine.processes import world as processes
from engine.processes.world import World
from shards.corrupt import Faults
from shards.decode import DecodeError
from shards.digest import digest
from shards.errors import InputError
from shards.making.left_out import tabulate
from shards.storage import files

Layer = Literal["stem", "layer1", "layer2", "layer3", "layer4"]
_LAYERS = ("layer1", "layer2", "layer3", "layer4")

BATCH = 64  # images that the network gets at once
PART_BYTES = 64 << 20  # A part has about this many bytes of features,
PART_ROWS = 8192  # and at most so many images.
PARTS, LEAST_ROWS = 16, 256  # There are about so many parts, unless they would be smaller.


@dataclass(frozen=True)
class FeaturesConfig:
    """Options of the features that are written."""

    layer: Layer = "layer4"
    """The layer whose output is taken, by torchvision's names. layer4 is the last one."""
    maps: bool = False
    """Write the layer's whole maps, [C, H, W] for each image, in place of their mean [C]."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the features in the files."""
    format: Format | None = None
    """Format of the files: npz, npy, safetensors or parquet. By default it is what OUT ends in, and
    npz when OUT is a folder. parquet needs pip install 'byol-engine[parquet]'."""
    overwrite: bool = False
    """Replace other features that OUT holds. The same features are not computed again."""


class _Layer(nn.Module):
    """An encoder up to one of its layers: images [B, 3, S, S] -> [B, C] or maps [B, C, H, W]."""

    def __init__(self, encoder: ResNet, config: FeaturesConfig) -> None:
        super().__init__()
        self.encoder, self.maps = encoder, config.maps
        stem = config.layer == "stem"
        self.names = () if stem else _LAYERS[: _LAYERS.index(config.layer) + 1]

    def forward(self, images: Tensor) -> Tensor:
        found = self.encoder.stem(images)
        for name in self.names:
            found = getattr(self.encoder, name)(found)
        return found if self.maps else found.mean(dim=(2, 3))


def choose_layer(network: Network, config: FeaturesConfig) -> nn.Module:
    """Return what computes the features that are asked for.

    Raises InputError when a layer is asked for and the network is no ResNet.
    """
    if isinstance(network, ResNet):
        return _Layer(network, config)
    if config.maps or config.layer != "layer4":
        there = "--network pixels has no layers"
        if isinstance(network, TorchvisionEncoder):
            there = f"layers are told apart in ResNets, and this is {network.config.describe()}"
        raise InputError(f"{there}: leave out --layer and --maps")
    return network


class Extraction:
    """One process's part in computing the features of a data set."""

    def __init__(
        self,
        source: Source,
        network: Network,
        images: Images,
        config: FeaturesConfig,
        output: Output,
        world: World,
        terminal: Terminal,
        *,
        threads: int,
        corrupt: float,
    ) -> None:
        """Prepare the network, and find out the shape of its features.

        Args:
            threads: Number of threads that decode.
            corrupt: Fraction of the images that this process may find undecodable.
        """
        self.source, self.images, self.config, self.output = source, images, config, output
        self.world, self.terminal = world, terminal
        self.threads = images.count_threads(threads, source.size**2)
        self.faults = Faults(images.samples, corrupt, terminal.report)
        self.transform = Transform(source.size, source.crop, source.rules)
        self.encode = encoding(choose_layer(network, config), source.precision, world.device)
        one = self._features([torch.zeros(3, source.size, source.size, dtype=torch.uint8)])
        header = Header(one.shape[1:], one.dtype, images.classes)
        most = min(max(1, PART_BYTES // one.nbytes), PART_ROWS)
        self.rows = min(most, max(LEAST_ROWS, -(-images.samples // PARTS)))
        origin = {
            "run": files.redact(source.run or source.url),
            "step": source.step,
            "images_from": files.redact(images.url),
        }
        count = -(-images.samples // self.rows)
        self.parts = Parts(output, self._settings(), origin, header, count)

    def _settings(self) -> dict[str, Any]:
        source, images, config = self.source, self.images, self.config
        return {
            "weights": source.digest,
            "network": source.network,
            "layer": config.layer,
            "maps": config.maps,
            "dtype": config.dtype,
            "format": self.output.format,
            "size": source.size,
            "crop": source.crop,
            "exif": source.rules.exif,
            "max_pixels": source.rules.max_pixels,
            "precision": source.precision,
            "data": images.digest,
            "content": images.content,
            "classes": digest(json.dumps(images.classes)),
            "images": images.samples,
            "rows_of_a_part": self.rows,
            **images.facts,
        }

    def run(self) -> None:
        """Write all features. All processes call it together.

        Raises InputError when OUT holds something else, and when too many images are damaged.
        """
        parts, world, say = self.parts, self.world, self.terminal.say
        if not world.on_main(lambda: parts.claim(self.config.overwrite)):
            say(f"already there: {files.redact(self.output.url)}")
            return
        done = set(world.on_main(parts.find_done))
        mine = [n for n in parts.numbers if n not in done][world.rank :: world.size]
        if done:
            say(f"{len(done):,} of {len(parts.numbers):,} parts are there already")
        processes.set_timeout(processes.LONGEST_TIMEOUT, [])  # for the parts of the others
        start, total = min(len(done) * self.rows, self.images.samples), self.images.samples
        with show_progress(self.terminal, "features", total, start) as progress:
            for number in mine:
                self._write_part(number, progress)
        world.all_gather_object(None)  # From here on, all parts are there.
        world.on_main(self._finish)

    def _write_part(self, number: int, progress: Progress) -> None:
        rows, left_out = Rows([], [], []), list[Fault]()
        header = self.parts.header
        features = np.empty((self.rows, *header.shape), header.dtype)
        filled = 0
        for batch in self._encode_part(number * self.rows, rows, left_out, progress):
            features[filled : filled + len(batch)] = batch
            filled += len(batch)
        self.parts.write(number, rows, features[:filled], left_out)

    def _encode_part(
        self, start: int, rows: Rows, left_out: list[Fault], progress: Progress
    ) -> Iterator[NDArray[Any]]:
        """Yield the features of a part's images in batches, and add to the lists what they are."""
        stop = min(start + self.rows, self.images.samples)
        samples, crops = self.images.read(start, stop), list[Tensor]()
        for sample, found in load(
            samples, self.transform.crop_pixels, self.threads, self.images.together
        ):
            name = as_text(sample.name)
            if isinstance(found, DecodeError):
                self.faults.record(sample.id, name, found)
                left_out.append(Fault(sample.id, name, str(found)))
            else:
                rows.ids.append(sample.id)
                rows.labels.append(sample.label)
                rows.names.append(name)
                crops.append(found)
            if len(crops) == BATCH:
                yield self._features(crops)
                crops.clear()
            progress.advance(self.world.size)
        if crops:
            yield self._features(crops)

    def _features(self, crops: list[Tensor]) -> NDArray[Any]:
        """Compute the features [B, ...] of uint8 crops [3, S, S] each."""
        found = self.encode(torch.stack(crops).to(self.world.device, non_blocking=True))
        cast = found.to(torch.float16 if self.config.dtype == "float16" else torch.float32)
        if bool(found.isfinite().all()) and not bool(cast.isfinite().all()):
            raise InputError("--dtype float16 cannot hold these features: give --dtype float32")
        array: NDArray[Any] = cast.cpu().contiguous().numpy()
        return array

    def _finish(self) -> None:
        facts = {
            "checkpoint": files.redact(self.source.url),
            "not_images": {
                reason: {"number": some.number, "example": as_text(some.example)}
                for reason, some in self.images.left_out.items()
            },
        }
        left_out = self.parts.finish(facts, self.terminal.report)
        say, rows = self.terminal.say, self.images.samples - len(left_out)
        if self.images.left_out:
            for line in tabulate({"images taken": self.images.samples}, self.images.left_out):
                say(line)
        if left_out:
            say(f"{len(left_out):,} cannot be decoded: see {files.redact(self.output.index)}")
        shape = " x ".join(str(length) for length in self.parts.header.shape)
        say(f"features  {rows:,} x {shape}: {files.redact(self.output.url)}")
