"""Open an encoder to measure or export: of a run, a checkpoint, or a file that others made."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, cast, get_args, get_type_hints

from annotated_types import Interval
from torch import Generator, Tensor, nn

from engine.encoder import foreign
from engine.encoder.foreign_files import read_tensors
from engine.method.precision import Precision
from engine.method.resnet import ResNet, ResNetConfig, initialize
from engine.processes.world import World
from engine.state import checkpoint, layout
from engine.state.checkpoint import Commit
from shards.digest import digest
from shards.errors import InputError
from shards.fields import as_flag, check_bounds
from shards.storage import files, names

TRIES = 3  # a training run may remove the checkpoint while it is read

_ENCODER = "model.encoder."
_PLACES = ("data.train", "data.val")
_BOUNDS: tuple[tuple[str, Any, float, float], ...] = (  # of fields in a checkpoint's recipe
    *((_ENCODER + name, hint, 1 / 64, 64) for name, hint in get_type_hints(ResNetConfig).items()),
    ("views.size", int, 8, 2**14),
    ("precision", Precision, 0, 0),
    ("seed", int, 0, 2**62),
    ("probe.crop", float, 1e-3, 1),
)


@dataclass(frozen=True)
class EncoderConfig:
    """Choose the network of a checkpoint, and the images that it gets."""

    checkpoint: str = "latest"
    """Which checkpoint of a run is taken: latest, or the number of its step."""
    network: Literal["online", "target", "untrained", "pixels"] = "online"
    """The network that is taken: online or target. For comparison, untrained is the run's
    encoder before the first step, and pixels is the image itself, which cannot be exported."""
    prefix: str | None = None
    """Name prefix of the encoder's tensors in a third-party file. By default it is
    detected. Give it only when the file holds several encoders."""
    size: Annotated[int | None, Interval(ge=8, le=2**14)] = None
    """Side of the network's input in pixels. By default it is the run's, and 224 for a third-party
    file."""
    crop: Annotated[float | None, Interval(ge=1e-3, le=1)] = None
    """Side of the central crop as a fraction of the image's shorter side. By default it is the
    run's, and 0.875 for a third-party file."""
    precision: Precision | None = None
    """Number format of the forward passes. By default it is the run's, and fp32 for a third-party
    file."""

    def check(self) -> None:
        """Raise InputError when a field has a value that it cannot have."""
        check_bounds(self, as_flag)
        if self.checkpoint != "latest" and not re.fullmatch("[0-9]{1,8}", self.checkpoint):
            raise InputError(
                f"--checkpoint must be latest or the number of a step, not {self.checkpoint!r}"
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
    config: ResNetConfig
    size: int
    crop: float
    precision: Precision
    fields: dict[str, Any]  # the run's recipe by dotted names; empty for a file that others made
    report: str  # one line that says what was taken

    def data_url(self, name: Literal["data.train", "data.val"]) -> str:
        """Return the URL of the run's data set; "" when the run has none.

        Raises InputError when it is a URL that a file that others made must not lead to.
        """
        if not self.run:
            return ""
        place = files.redact(files.join(self.run, layout.RECIPE))
        return names.check_url(self.fields.get(name, ""), name, place)


class Pixels(nn.Module):
    """Take the encoder's place and return the pixels: [N, 3, S, S] -> [N, 3 * S * S]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.feature_dim = 3 * size * size

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


Network = ResNet | Pixels


def open_encoder(
    url: str, config: EncoderConfig, world: World, report: Callable[[str], None]
) -> tuple[Source, Network]:
    """Load a network in evaluation mode, on the CPU in float32, and describe its source.

    All processes call it together. Raises InputError when there is no sound checkpoint.
    """
    config.check()
    files.check(url, "CHECKPOINT")
    kind = world.on_main(lambda: _kind(url))
    if kind == "file":
        return _foreign(url, config)
    if config.prefix is not None:
        raise InputError(f"--prefix is for files that others made: {files.redact(url)} is a run")
    for attempt in range(1, TRIES + 1):
        there = world.on_main(partial(_steps, url))
        try:
            return _own(_find(url, config, world, report), config, world)
        except (InputError, OSError):
            changed = world.on_main(partial(_steps, url)) != there
            if not changed or attempt == TRIES or config.checkpoint != "latest":
                raise
            report(f"{files.redact(url)}: the run went on meanwhile; taking a newer checkpoint")
    raise AssertionError("unreachable")


def _steps(url: str) -> list[str]:
    """List the checkpoints of a run. The list is empty where folders may not be listed."""
    try:
        return checkpoint.steps(url)
    except PermissionError:
        return []


def _can_read(url: str) -> bool:
    try:
        return files.exists(url)
    except PermissionError:  # AWS answers so where nothing is, if folders may not be listed.
        return False


def _kind(url: str) -> Literal["folder", "file"]:
    try:
        if files.list_names(url):
            return "folder"
    except PermissionError:  # Single objects may be readable all the same.
        folder = _can_read(files.join(url, checkpoint.COMMIT)) or not _can_read(url)
        return "folder" if folder else "file"
    if not files.exists(url):
        raise InputError(
            f"CHECKPOINT {files.redact(url)}: nothing there; give the URL of a run, of one of "
            f"its checkpoints, or of a checkpoint file{checkpoint.hint(url)}"
        )
    if url.endswith((".json", ".jsonl", ".distcp")):
        raise InputError(f"CHECKPOINT {files.redact(url)}: is no checkpoint{checkpoint.hint(url)}")
    return "file"


def _find(url: str, config: EncoderConfig, world: World, report: Callable[[str], None]) -> Commit:
    if config.checkpoint == "latest":
        return checkpoint.find(url, world, report, "CHECKPOINT")
    return checkpoint.verify(world.on_main(partial(_step_url, url, int(config.checkpoint))), world)


def _step_url(run: str, step: int) -> str:
    wanted, there = checkpoint.step_url(run, step), checkpoint.steps(run)
    if wanted not in there:
        known = ", ".join(str(int(url[-8:])) for url in there) or "none"
        raise InputError(
            f"CHECKPOINT {files.redact(run)}: no run with a checkpoint of step {step}; there "
            f"are: {known}"
        )
    return wanted


def _own(commit: Commit, config: EncoderConfig, world: World) -> tuple[Source, Network]:
    place = files.redact(commit.url)
    above, _, _ = commit.url.rstrip("/").rpartition("/")
    home, _, folder = above.rpartition("/")
    home = (home or ".") if folder == layout.CHECKPOINTS else ""
    fields = layout.read_recipe(home) if home else {}
    # The commit decides the method. Only recipe.json says where the data is.
    fields |= {name: value for name, value in commit.method.items() if name not in _PLACES}
    try:
        resnet = ResNetConfig(
            **{
                name.removeprefix(_ENCODER): value
                for name, value in fields.items()
                if name.startswith(_ENCODER)
            }
        )
        size, precision, seed = fields["views.size"], fields["precision"], fields["seed"]
    except (KeyError, TypeError):
        raise InputError(f"{place}: its recipe lacks fields that this version knows") from None
    for name, hint, low, high in _BOUNDS:
        if name in fields and not _is_sound(fields[name], hint, low, high):
            shown = ascii(fields[name])[:80]
            raise InputError(f"{place}: its recipe is damaged, {name} is {shown}")
    size = config.size or size
    network: Network = ResNet(resnet, views=1)
    if config.network == "pixels":
        network = Pixels(size)
    elif config.network == "untrained":
        initialize(network, Generator().manual_seed(2 * seed))  # the same seed as in byol.build
    else:
        own = {f"encoder.{name}": value for name, value in network.state_dict().items()}
        checkpoint.load(commit, {config.network: own}, world)
    sums = sorted((name, *entry) for name, entry in commit.files.items())
    return Source(
        url=commit.url,
        run=home,
        step=commit.step,
        network=config.network,
        digest=_digest(sums),
        data_digest=commit.index_digest,
        config=resnet,
        size=size,
        crop=config.crop or fields.get("probe.crop", 0.875),
        precision=config.precision or precision,
        fields={k: files.redact(v) if isinstance(v, str) else v for k, v in fields.items()},
        report=f"{config.network} network of {place}",
    ), network


def _is_sound(value: object, hint: Any, low: float, high: float) -> bool:
    """Return whether a recipe's field can have this value, which was read from JSON."""
    if choices := get_args(hint):
        return any(type(value) is type(choice) and value == choice for choice in choices)
    if hint is bool:
        return type(value) is bool
    numbers: tuple[type, ...] = (int,) if hint is int else (int, float)
    return type(value) in numbers and low <= cast(float, value) <= high


def _foreign(url: str, config: EncoderConfig) -> tuple[Source, Network]:
    place = files.redact(url)
    if config.checkpoint != "latest":
        raise InputError(f"--checkpoint {config.checkpoint} is for runs: {place} is a file")
    if config.network in ("untrained", "pixels"):
        raise InputError(f"--network {config.network} is for runs: {place} is a file")
    tensors = read_tensors(url)
    side: Literal["online", "target"] = "target" if config.network == "target" else "online"
    found = foreign.match(tensors, side, place, config.prefix)
    network = ResNet(found.config, views=1)
    network.load_state_dict(found.state)
    sums = [(name, value.double().sum().item()) for name, value in found.state.items()]
    return Source(
        url=url,
        run="",
        step=None,
        network=config.network,
        digest=_digest(sums),
        data_digest="",
        config=found.config,
        size=config.size or 224,
        crop=config.crop or 0.875,
        precision=config.precision or "fp32",
        fields={},
        report=f"{place}: {found.report}",
    ), network


def _digest(facts: object) -> str:
    return digest(repr(facts))
