"""Open an encoder to measure or export: of a run, a checkpoint, or a file that others made."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_type_hints

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Generator, Tensor, nn

from engine.encoder.chosen import find_commit, find_kind, read_newest
from engine.encoder.foreign import Side
from engine.encoder.foreign_files import read_tensors
from engine.encoder.foreign_torchvision import match_any
from engine.method.average import PART
from engine.method.encoders import ENCODERS, BackboneConfig, Encoder, LastGamma, initialize_encoder
from engine.method.initialization import Initialization
from engine.method.precision import Precision
from engine.method.resnet import ResNetConfig
from engine.processes.world import World
from engine.state import checkpoint, layout, origin
from engine.state.checkpoint import Commit
from shards.decode import DEFAULT_RULES, Exif, PixelRules
from shards.digest import digest
from shards.documents import check
from shards.errors import InputError
from shards.fields import as_flag, check_bounds
from shards.storage import files, names

_KIND, _ENCODER = "model.encoder", "model.encoder."
DataField = Literal["data.train", "data.val", "probe.train", "probe.val"]
PIXELS = 32  # largest side of an image whose pixels are the features
_PLACES = ("data.train", "data.val")
_HINTS: dict[str, Any] = {  # types and bounds of the fields that are used of a stranger's recipe
    **{
        _ENCODER + name: hint
        for kind in ENCODERS.values()
        for name, hint in get_type_hints(kind, include_extras=True).items()
    },
    _KIND: Literal["ResNetConfig", "TorchvisionConfig"],
    "model.initialization": Initialization,
    "model.last_gamma": LastGamma,
    "views.size": Annotated[int, Interval(ge=8, le=2**12)],
    "precision": Precision,
    "seed": Annotated[int, Interval(ge=0, le=2**62)],
    "probe.crop": Annotated[float, Interval(ge=1e-3, le=1)],
    "data.max_pixels": Annotated[int, Interval(ge=1, le=2**32)],
    "data.exif": Exif,
}


@dataclass(frozen=True)
class EncoderConfig:
    """Choose the network of a checkpoint, and the images that it gets."""

    checkpoint: str = "latest"
    """Which checkpoint of a run is taken: latest, best, or the number of its step. best is the one
    that is kept where the log has the largest value of the run's checkpoint.keep_best, by default
    of knn_top1."""
    network: Literal["online", "target", "average", "untrained", "pixels"] = "online"
    """The network that is taken: online or target, or average, the online one's average over the
    steps, which runs with average.rate have. For comparison, untrained is the run's encoder as its
    seed draws it, and pixels is the image itself, at 32 x 32 pixels where it is larger, which
    cannot be exported."""
    prefix: str | None = None
    """What stands before conv1.weight in the encoder's tensor names in a third-party file, as a
    whole. Where names mean nothing it is the name of the encoder's first tensor. It is needed only
    when the file holds several encoders, and the error message then lists all of them."""
    size: Annotated[int | None, Interval(ge=8, le=2**12)] = None
    """Side of the network's input in pixels. By default it is the run's, and 224 for a third-party
    file."""
    crop: Annotated[float | None, Interval(ge=1e-3, le=1)] = None
    """Side of the central crop as a fraction of the image's shorter side. By default it is the
    run's, and 0.875 for a third-party file."""
    exif: Exif | None = None
    """Orientation in the EXIF data of images: ignore takes the pixels as they are stored, and apply
    turns them upright. By default it is the run's, and ignore for a third-party file."""
    precision: Precision | None = None
    """Number format of an evaluation's forward passes. By default it is the run's, and fp32 for a
    third-party file. An export does not depend on it, because exported files are in fp32."""

    def check(self) -> None:
        """Raise InputError when a field has a value that it cannot have."""
        check_bounds(self, as_flag)
        if not re.fullmatch("latest|best|[0-9]{1,18}", self.checkpoint):
            raise InputError(
                "--checkpoint must be latest, best or the number of a step, "
                f"not {self.checkpoint!r}"
            )

    def rules(self, fields: dict[str, Any]) -> PixelRules:
        """Return the rules by which image files become pixels, given the run's recipe."""
        return PixelRules(
            fields.get("data.max_pixels", DEFAULT_RULES.max_pixels),
            self.exif or fields.get("data.exif", DEFAULT_RULES.exif),
        )


@dataclass(frozen=True)
class Source:
    """Describe where an encoder came from, and which images it needs."""

    url: str  # URL of the checkpoint
    run: str  # URL of the run; empty for a file that others made
    step: int | None
    network: str
    digest: str  # digest of the weights, 16 hex digits
    data_digest: str  # digest of the run's training set; empty for a file that others made
    config: BackboneConfig
    size: int
    crop: float
    rules: PixelRules
    precision: Precision
    fields: dict[str, Any]  # the run's recipe by dotted names; empty for a file that others made
    report: str  # one line that says what was taken

    def data_url(self, name: DataField) -> str:
        """Return the URL of the run's data set; "" when the run has none.

        Raises InputError when it is of a kind that is never opened on the word of a file.
        """
        if not self.run:
            return ""
        place = files.redact(files.join(self.run, layout.RECIPE))
        return names.check_url(self.fields.get(name, ""), name, place)


class Pixels(nn.Module):
    """Take the encoder's place and return the pixels: [N, 3, S, S] -> [N, 3 * P * P].

    Images that are larger than PIXELS are averaged down to it. At 224 pixels the features of 50,000
    images would need 30 GB.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.side = min(size, PIXELS)
        self.feature_dim = 3 * self.side**2

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, self.side).flatten(1)


Network = Encoder | Pixels


def open_encoder(
    url: str, config: EncoderConfig, world: World, report: Callable[[str], None]
) -> tuple[Source, Network]:
    """Load a network, on the CPU in float32, and describe its source.

    The caller puts it into evaluation mode. All processes call it together. Raises InputError when
    there is no sound checkpoint.
    """
    config.check()
    files.check(url, "CHECKPOINT")
    kind = world.on_main(lambda: find_kind(url))
    if kind == "file":
        return world.on_all(partial(_foreign, url, config))
    if config.prefix is not None:
        raise InputError(f"--prefix is for files that others made: {files.redact(url)} is a run")

    def read() -> tuple[Source, Network]:
        return _own(find_commit(url, config.checkpoint, world, report), config, world)

    if config.checkpoint != "latest":
        return read()
    return read_newest(url, world, report, read)


def _own(commit: Commit, config: EncoderConfig, world: World) -> tuple[Source, Network]:
    place = files.redact(commit.url)
    home = origin.home(commit.url)
    home = "" if home == commit.url.rstrip("/") else home
    fields = world.on_main(partial(layout.read_recipe, home)) if home else {}
    # The commit decides the method. Only recipe.json says where the data is.
    fields |= {name: value for name, value in commit.method.items() if name not in _PLACES}
    remedy = "use the version of this engine that wrote it"
    try:
        fields |= {k: check(hint, fields[k], k) for k, hint in _HINTS.items() if k in fields}
        kind = ENCODERS[fields.get(_KIND, "ResNetConfig")]
        given = {n.removeprefix(_ENCODER): v for n, v in fields.items() if n.startswith(_ENCODER)}
        backbone: BackboneConfig = kind(**given)
        size, precision, seed = fields["views.size"], fields["precision"], fields["seed"]
        backbone.check_size(size)
    except InputError as error:
        raise InputError(f"{place}: its recipe is damaged: {error}") from None
    except KeyError as missing:
        raise InputError(f"{place}: its recipe has no field {missing.args[0]}: {remedy}") from None
    except TypeError:
        unknown = ", ".join(sorted(ascii(n)[:80] for n in given.keys() - get_type_hints(kind)))
        told = f"{place}: model.encoder has unknown fields ({unknown}): {remedy}"
        raise InputError(told) from None
    size = _check_size(backbone, size, config.size)
    _check_weight(backbone, size, commit)
    encoder = backbone.build(1, size)
    network: Network = encoder
    if config.network == "pixels":
        network = Pixels(size)
    elif config.network == "untrained":
        rule = fields.get("model.initialization", "official")
        gamma = fields.get("model.last_gamma", "zero")
        # the same seed as in byol.build
        initialize_encoder(encoder, Generator().manual_seed(2 * seed), rule, gamma)
    else:
        _check_held(config.network, commit, world)
        own = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
        checkpoint.load(commit, {config.network: own}, world)
    return Source(
        url=commit.url,
        run=home,
        step=commit.step,
        network=config.network,
        digest=digest_of(commit),
        data_digest=commit.index_digest,
        config=backbone,
        size=size,
        crop=config.crop or fields.get("probe.crop", 0.875),
        rules=config.rules(fields),
        precision=config.precision or precision,
        fields=layout.without_secrets(fields),
        report=f"{config.network} network of {place}",
    ), network


def _check_held(network: str, commit: Commit, world: World) -> None:
    """Raise InputError, naming the networks that are there, when the checkpoint has no average."""
    held = checkpoint.shapes(commit, world) if network == PART else {}
    if network != PART or any(name.startswith(f"{PART}.") for name in held):
        return
    there = [o for o in ("online", "target") if any(name.startswith(f"{o}.") for name in held)]
    raise InputError(
        f"--network {network}: {files.redact(commit.url)} has no average, because the run has not "
        f"kept one (--average.rate): give --network {' or '.join(there)}"
    )


def digest_of(commit: Commit) -> str:
    """Return a digest of all tensors in a checkpoint."""
    return _digest(sorted((name, *entry) for name, entry in commit.files.items()))


def _check_size(config: BackboneConfig, own: int, given: int | None) -> int:
    """Return the side of the network's input. Raises InputError when it cannot have that size."""
    if given is None or isinstance(config, ResNetConfig):
        return given or own
    config.check_size(given, "--size")
    if config.fixed_size and given != own:
        raise InputError(
            f"--size {given}: the weights of {config.describe()} are for images of {own} pixels: "
            "leave it out"
        )
    return given


def _check_weight(config: BackboneConfig, size: int, commit: Commit) -> None:
    """Raise InputError when the network needs more memory than the checkpoint's files can fill."""
    with torch.device("meta"):
        needed = sum(value.nbytes for value in config.build(1, size).parameters())
    there = sum(length for length, _ in commit.files.values())
    if needed > there:
        raise InputError(
            f"{files.redact(commit.url)}: its recipe is damaged: the encoder has {needed:,} bytes, "
            f"and all files of the checkpoint have {there:,}"
        )


def _foreign(url: str, config: EncoderConfig) -> tuple[Source, Network]:
    place = files.redact(url)
    if config.checkpoint != "latest":
        raise InputError(f"--checkpoint {config.checkpoint} is for runs: {place} is a file")
    if config.network in ("average", "untrained", "pixels"):
        raise InputError(f"--network {config.network} is for runs: {place} is a file")
    tensors = read_tensors(url, "CHECKPOINT")
    side: Side = "target" if config.network == "target" else "online"
    found, own_size = match_any(tensors, side, place, config.prefix)
    size = _check_size(found.config, own_size, config.size)
    network = found.config.build(1, size)
    # Beside its weights a network may have constants, such as tables of positions.
    network.stock_module().load_state_dict(network.stock_state() | found.state)
    sums = [(name, value.double().sum().item()) for name, value in found.state.items()]
    return Source(
        url=url,
        run="",
        step=None,
        network=config.network,
        digest=_digest(sums),
        data_digest="",
        config=found.config,
        size=size,
        crop=config.crop or 0.875,
        rules=config.rules({}),
        precision=config.precision or "fp32",
        fields={},
        report=f"{place}: {found.report}",
    ), network


def _digest(facts: object) -> str:
    return digest(repr(facts))
