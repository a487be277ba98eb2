"""Open an encoder and its data for an evaluation, compute features, and publish the result.

All evaluation protocols share this.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, replace
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor

from engine.encoder.source import EncoderConfig, open_encoder
from engine.evaluation.features import Features, encoding, extract
from engine.evaluation.given_sets import GivenSet
from engine.evaluation.results import Result, read_result, show
from engine.evaluation.run_sets import Name, check_classes, is_own, open_sets, packing_options
from engine.log import journal
from engine.log.curves import name_curve
from engine.log.events import EventLog
from engine.log.progress import show_progress
from engine.log.terminal import Terminal
from engine.method.precision import slow_on
from engine.processes.identity import agent_identity
from engine.processes.world import World, share_of_cores
from engine.state import lease
from engine.state.layout import CHECKPOINTS, EVALUATIONS, RESULT, refuse_links
from shards.center_crops import CropReader, EvalBatch
from shards.decode import DEFAULT_RULES
from shards.digest import digest
from shards.errors import InputError
from shards.fields import UnitInterval
from shards.index import Index
from shards.matching import compare_images, compare_windows
from shards.storage import files
from shards.storage.local_files import NotWritable

PACKED = "packed"  # the folder of what was packed, beside the results


@dataclass(frozen=True)
class EvaluationDataConfig:
    """Options for the data that an encoder is measured on."""

    train: str = ""
    """URL of the training images, in which neighbors are searched or from which a head learns:
    shards, or a folder of images with one folder for each class, which is packed beside the
    results. By default they are the run's."""
    val: str = ""
    """URL of the images that the accuracy is measured on: shards, or a folder of images. By default
    they are the run's. A run whose own images have no labels is measured on its probe.train and
    probe.val."""
    corrupt: UnitInterval = 0.01
    """Fraction of the images that each process may find undecodable before the evaluation stops. It
    may always find 10."""
    max_pixels: Annotated[int | None, Interval(ge=1, le=2**32)] = None
    """Images whose header claims more pixels count as undecodable. By default it is the run's
    data.max_pixels, and 89,478,485 for a third-party file."""


class Evaluation:
    """One process's part in evaluating an encoder on a pair of data sets."""

    def __init__(
        self,
        protocol: str,
        checkpoint_url: str,
        encoder: EncoderConfig,
        data: EvaluationDataConfig,
        settings: dict[str, Any],
        world: World,
        *,
        out: str,
        threads: int | None,
        labels: bool = True,
    ) -> None:
        """Open the encoder and the data sets. All processes call it together.

        Args:
            settings: The protocol's settings by dotted name. Results of other settings are kept
                apart.
            out: URL of a folder for the results. The run is then left alone. When it is empty, the
                results go to the run.
            labels: Whether the protocol needs labels.

        Raises InputError before anything expensive begins.
        """
        self.world, self.protocol = world, protocol
        self.terminal = Terminal(world.main)
        self.terminal.say(f"{protocol}: opening {files.redact(checkpoint_url)}")
        self.threads = threads or share_of_cores()
        self.corrupt = data.corrupt
        files.check(out, "--out")
        files.check_folder(out or EVALUATIONS, "--out")
        named: dict[Name, str] = {"data.train": data.train, "data.val": data.val}
        self._given = {n: GivenSet(url, n, world, labels=labels) for n, url in named.items() if url}
        self.source, self.network = open_encoder(checkpoint_url, encoder, world, self.terminal.say)
        self.rules = self.source.rules
        if data.max_pixels is not None:
            self.rules = replace(self.rules, max_pixels=data.max_pixels)
        self.run = "" if out else self.source.run  # the run that gets the results
        if self.run:
            refuse_links(self.run, (EVALUATIONS,), "give --out for the results")
        self.home = out or (files.join(self.run, EVALUATIONS) if self.run else EVALUATIONS)
        self.train, self.val = self._open_sets(labels)
        self.crops = CropReader(
            self.source.size,
            self.source.crop,
            self.threads,
            data.corrupt,
            self.terminal.report,
            part=(world.rank, world.size),
            rules=self.rules,
        )
        self.encode = encoding(self.network, self.source.precision, world.device)
        self.settings = settings
        self.url = self._folder()
        self.terminal.say(f"{protocol}: {self.source.report}")
        if warning := slow_on(world.device, self.source.precision):
            self.terminal.say(warning)

    @property
    def classes(self) -> int:
        return len(self.train.classes)

    def _open_sets(self, labels: bool) -> tuple[Index, Index]:
        """Open the sets to learn from and to measure, and say what is doubtful about them."""
        train, val = open_sets(
            self._given,
            self.source,
            self.world,
            labels=labels,
            open_given=self._open_given,
            report=self.terminal.say,
        )
        if labels:
            check_classes(train, val)
        doubts = compare_windows(train, val), compare_images(train, val) if labels else ""
        for doubt in filter(None, doubts):
            self.terminal.say(doubt)
        self._own_data = not (self._given and self.source.run) or self.world.on_main(
            lambda: is_own(self.source, train, val, labels=labels)
        )
        return train, val

    def _open_given(self, given: GivenSet) -> Index:
        """Open a set that the command line names. A folder is packed beside the results."""
        if given.index is not None:
            return given.index
        say, place = self.terminal.say, files.join(self.home, PACKED)
        index = given.open(
            place,
            lambda: packing_options(self.source, list(self._given.values()), self.rules.max_pixels),
            threads=self.threads,
            report=say,
            alone=False,
        )
        say(f"{given.name} is packed, and stays: {files.redact(index.url)}")
        return index

    def extract(
        self,
        index: Index,
        encode: Callable[[Tensor], Tensor] | None = None,
        *,
        ids: NDArray[np.int64] | None = None,
        limit: int | None = None,
        unlabeled: bool = False,
    ) -> Features:
        """Compute the features of central crops, for this process's blocks; see `CropReader`.

        Args:
            encode: Used in place of the encoder. Maps uint8 images [B, 3, S, S] to features [B, F].
            ids: The samples to read, rising. By default all samples are read.
            limit: Approximate number of samples to read, in evenly spaced blocks.
            unlabeled: Include the samples that have no label.
        """
        count = index.samples if ids is None else len(ids)
        shown = self._show_progress(
            self.crops.read(index, ids=ids, limit=limit), min(count, limit or count)
        )
        return extract(encode or self.encode, shown, self.world.device, unlabeled=unlabeled)

    def check_labels(
        self, index: Index, images: str, use: str, ids: NDArray[np.int64] | None = None
    ) -> None:
        """Raise InputError unless some image has a label and can be decoded.

        Call it before anything is learned. It is cheap, because each process reads its part only up
        to the first such image. All processes call it together.

        Args:
            images: Describes the images in the message, such as "of data.val".
            use: Describes their purpose in the message, such as "measured on it".
            ids: The samples to consider, rising. By default all samples are considered.
        """
        with closing(self.crops.read(index, ids=ids)) as crops:
            found = any(bool((batch.labels >= 0).any()) for batch in crops)
        if not self.world.all_reduce(torch.tensor(int(found))):
            raise InputError(
                f"no image {images} has a label and can be decoded, so nothing could be {use}: "
                "label more images, or repair them"
            )

    def _show_progress(self, batches: Iterable[EvalBatch], total: int) -> Iterator[EvalBatch]:
        """Yield the batches and show how many images are done.

        All processes are assumed to be as fast as this one.
        """
        with show_progress(self.terminal, "features", total) as progress:
            for batch in batches:
                yield batch
                progress.advance(len(batch.ids) * self.world.size)

    def name(self, figure: str) -> str:
        """Return a figure's name in the run's metrics, such as linear_top1 or linear_target_top1.

        When the data are not the run's own, the beginning of data.val's digest is added.
        """
        network = "" if self.source.network == "online" else f"_{self.source.network}"
        other = "" if self._own_data else f"_on_{self.val.digest[:6]}"
        return f"{self.protocol}{network}_{figure}{other}".replace("-", "_")

    def find_earlier(self) -> Result | None:
        """Return and print the result of the same evaluation, if it was made before."""
        url = files.join(self.url, RESULT)
        result = self.world.on_main(lambda: read_result(url, self.terminal.report))
        if result is not None:
            place = files.redact(url)
            self.terminal.say(f"measured before: remove {place} to measure again")
            show(result, self.terminal.console)
        return result

    @contextmanager
    def hold_folder(self) -> Iterator[None]:
        """Hold the folder of the results, so that no other job makes the same evaluation meanwhile.

        This writes to the folder, so a folder that can't be written to is found before anything
        expensive begins.

        Raises InputError when another job makes the same evaluation, and OSError when the folder
        can't be written to.
        """
        agents, held = self.world.all_gather_object(agent_identity()), list[lease.Lease]()

        def hold() -> None:
            try:
                held.append(lease.acquire(self.url, agents, lease.PERIOD, self.terminal.say))
            except InputError:
                place = files.redact(self.url)
                raise InputError(
                    f"{place}: another job is at this evaluation: wait for it, or give --out"
                ) from None
            except NotWritable:  # The command proposes --out wherever that is raised.
                raise
            except PermissionError as error:
                raise PermissionError(f"{error}; or give --out, a folder elsewhere") from None

        self.world.on_main(hold)
        try:
            yield
        finally:
            for lease_held in held:
                lease_held.release()

    def publish(self, result: Result) -> None:
        """Print the result, and write it as JSON, to tensorboard and to the run's metrics, if any.

        The saved states of the evaluation are removed, because they are not needed any more.
        """
        show(result, self.terminal.console)
        self.world.on_main(lambda: self._write(result))
        saved = files.join(self.url, CHECKPOINTS)
        self.world.on_main(lambda: files.discard(saved, self.url, self.terminal.report))
        self.terminal.say(f"result  {files.redact(files.join(self.url, RESULT))}")

    def events(self) -> EventLog:
        """Open the event files of evaluations, which are no part of the training's curves."""
        return EventLog(self.curves, None)

    @property
    def curves(self) -> str:
        """Return the URL of tensorboard's files. Those of other data than the run's lie apart."""
        apart = f"on_{self.val.digest[:6]}"
        return self.home if self._own_data else files.join(self.home, apart)

    def _folder(self) -> str:
        source = self.source
        if source.step is None:
            stem = PurePosixPath(files.redact(source.url)).name.partition(".")[0] or "file"
        else:
            stem = f"step_{source.step:08d}"
        facts = [source.digest, source.size, source.crop, source.precision]
        facts += [self.train.digest, self.val.digest, sorted(self.settings.items())]
        if self.rules != DEFAULT_RULES:  # Results of earlier releases keep their folders.
            facts.append(astuple(self.rules))

        def place(*more: str) -> str:
            facts_digest = digest(json.dumps([*facts, *more]), 8)
            return files.join(self.home, stem, f"{self.protocol}-{source.network}-{facts_digest}")

        earlier = place()
        if self.world.on_main(lambda: self._is_result_of_these_sets(earlier)):
            return earlier
        return place(self.train.content, self.val.content)

    def _is_result_of_these_sets(self, url: str) -> bool:
        """Return whether an earlier release wrote a result there, on sets at the same places."""
        try:
            data = files.read_json(files.join(url, RESULT))["data"]
            there = [data[name]["url"] for name in ("train", "val")]
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return there == [files.redact(index.url) for index in (self.train, self.val)]

    def _write(self, result: Result) -> None:
        source = self.source
        sets = {"train": self.train, "val": self.val}
        document = {
            "protocol": self.protocol,
            "checkpoint": files.redact(source.url),
            "step": source.step,
            "network": source.network,
            "weights": source.digest,
            "input": {
                "size": source.size,
                "crop": source.crop,
                "exif": self.rules.exif,
                "max_pixels": self.rules.max_pixels,
                "precision": source.precision,
            },
            "settings": self.settings,
            "data": {
                name: {
                    "url": files.redact(index.url),
                    "digest": index.digest,
                    "content": index.content,
                }
                for name, index in sets.items()
            },
            "packages": {name: version(name) for name in ("torch", "torchvision")},
            "metrics": result.metrics,
            "table": result.table,
        }
        step = source.step or 0
        events = self.events()
        events.scalars({name_curve(k): v for k, v in result.metrics.items()}, step)
        events.flush()
        if self.run and source.network in ("online", "target", "average"):
            journal.add(self.run, {"step": step} | result.metrics)
            if lease.is_free(self.run):
                _fold(self.run)
        # This comes last: once the file is there, the same command does none of this again.
        files.write(files.join(self.url, RESULT), json.dumps(document, indent=1).encode())


def _fold(run: str) -> None:
    """Merge the added figures into metrics.jsonl of a run that no job trains.

    The run is held meanwhile.
    """
    try:
        held = lease.acquire(run, [agent_identity()], lease.PERIOD, lambda _: None)
    except InputError:  # a job has just begun, and it merges them itself
        return
    try:
        journal.Journal(run, 1 << 62)  # all steps
    finally:
        held.release()
