"""Read the weights that a new run starts from: of a run, a checkpoint, or a file of others."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Size, Tensor, nn

from engine.encoder import foreign
from engine.encoder.chosen import find_kind, read_newest
from engine.encoder.foreign import Foreign
from engine.encoder.foreign_files import read_tensors
from engine.encoder.foreign_torchvision import find_larger, match_any, match_torchvision
from engine.encoder.source import digest_of
from engine.method.byol import BYOLConfig, Online, Target
from engine.method.encoders import ENCODERS, BackboneConfig
from engine.method.resnet import ResNetConfig
from engine.method.torchvision_encoder import TorchvisionConfig
from engine.processes.world import World
from engine.state import checkpoint
from engine.state.checkpoint import Commit
from engine.state.origin import Weights
from shards.documents import shown
from shards.errors import InputError
from shards.fields import as_option
from shards.storage import files

FIELD = "model.start"
_KIND = "model.encoder"
_DIGITS = 16


class StartWeights(NamedTuple):
    """Hold the weights that a run starts from, by the names of the networks' state dicts."""

    online: dict[str, Tensor]
    target: dict[str, Tensor]
    source: Weights
    report: str  # one line that says what was taken

    def fill(self, online: Online, target: Target) -> None:
        """Copy the weights into networks that hold all of their parameters."""
        online.load_state_dict(self.online, strict=False)
        target.load_state_dict(self.target, strict=False)


def read_start(
    config: BYOLConfig, classes: int, size: int, world: World, report: Callable[[str], None]
) -> StartWeights:
    """Read the weights at `config.start`. All processes call it together.

    Args:
        classes: Number of classes of the online head; 0 when there is none.
        size: Side of the views in pixels, which some encoders need.
        report: Takes a line about checkpoints that are skipped.

    Raises InputError when there are none, or when they are of another encoder.
    """
    url = config.start
    if world.on_main(lambda: find_kind(url, FIELD)) == "file":
        return world.on_all(lambda: _of_file(config, classes, size))
    if config.start_prefix is not None:
        raise InputError(
            f"model.start_prefix is for files that others made: {files.redact(url)} is a run"
        )

    def read() -> StartWeights:
        return _of_run(checkpoint.find(url, world, report, FIELD), config, classes, size, world)

    return read_newest(url, world, report, read)


def _of_file(config: BYOLConfig, classes: int, size: int) -> StartWeights:
    place = f"{FIELD} {files.redact(config.start)}"
    tensors = read_tensors(config.start, FIELD)
    found = _match(tensors, config, size, place)
    prefix = "encoder.network." if isinstance(found.config, TorchvisionConfig) else "encoder."
    state = {prefix + name: value for name, value in found.state.items()}
    content = hashlib.sha256()
    for name, value in sorted(state.items()):
        content.update(f"{name} {list(value.shape)}".encode())
        content.update(value.contiguous().numpy().tobytes())
    drawn = "projector and predictor are" if not classes else "projector, predictor and head are"
    return StartWeights(
        state,
        dict(state),
        Weights(files.redact(config.start), content.hexdigest()[:_DIGITS]),
        f"{place}: {found.report}; the encoder starts both networks, {drawn} drawn",
    )


def _match(tensors: dict[str, Tensor], config: BYOLConfig, size: int, place: str) -> Foreign:
    prefix, flag = config.start_prefix, "--model.start-prefix"
    own = config.encoder
    try:
        if isinstance(own, TorchvisionConfig):
            found = match_torchvision(tensors, own, size, "online", place, prefix, flag)
        else:
            found = foreign.match(tensors, "online", place, prefix, flag)
    except InputError:
        held = _identify(tensors, place)
        if held is None or _is_like(held, own):
            raise
        raise _other_encoder(place, _name_fields(held), own) from None
    if isinstance(own, TorchvisionConfig):
        if larger := find_larger(own, size, tensors):
            raise _other_encoder(place, _name_fields(larger), own)
        return found
    with torch.device("meta"):
        shapes = _shapes(own.build(1, size))
    if shapes != {name: value.shape for name, value in found.state.items()}:
        raise _other_encoder(place, _name_fields(found.config), own)
    return found


def _identify(tensors: dict[str, Tensor], place: str) -> BackboneConfig | None:
    """Return the one network that a file of others holds; None where that is not known."""
    try:
        return match_any(tensors, "online", place, None).encoder.config
    except InputError:
        return None


def _is_like(held: BackboneConfig, own: BackboneConfig) -> bool:
    """Return whether both are of one kind and fit each other but for the size or the prefix."""
    return held == own or (isinstance(held, ResNetConfig) and isinstance(own, ResNetConfig))


def _of_run(
    commit: Commit, config: BYOLConfig, classes: int, size: int, world: World
) -> StartWeights:
    place = f"{FIELD} {files.redact(commit.url)}"
    held = checkpoint.shapes(commit, world)
    with torch.device("meta"):
        online, target = Online(config, classes, size), Target(config, size)
        wanted = {
            **{f"online.{name}": value for name, value in online.state_dict().items()},
            **{f"target.{name}": value for name, value in target.state_dict().items()},
        }
    fitting = {name for name, value in wanted.items() if held.get(name) == value.shape}

    def fits(part: str) -> bool:
        return all(name in fitting for name in wanted if name.startswith(f"{part}."))

    if not fits("online.encoder"):
        there = {_KIND: ResNetConfig.__name__, **commit.method}
        if config.encoder.fixed_size and there.get("views.size") != size:
            raise InputError(
                f"{place}: its weights are for images of {shown(there.get('views.size'))} pixels, "
                f"and views.size is {size}: give the same size"
            )
        raise _other_encoder(place, there, config.encoder)
    whole = all(map(fits, ("online.projector", "online.predictor", "target")))
    parts = ["online.encoder"]
    if whole:
        parts += ["online.projector", "online.predictor", "target"]
    if whole and classes and fits("online.classifier"):
        parts.append("online.classifier")
    state = {
        name: torch.empty(value.shape, dtype=value.dtype, device="cpu")
        for name, value in wanted.items()
        if any(name.startswith(f"{part}.") for part in parts)
    }
    checkpoint.load(commit, state, world)
    own, other = (
        {n.removeprefix(f"{side}."): v for n, v in state.items() if n.startswith(f"{side}.")}
        for side in ("online", "target")
    )
    return StartWeights(
        own,
        other if whole else dict(own),
        Weights(files.redact(commit.url), digest_of(commit)),
        f"{place}: {_describe(whole, classes, parts, held)}",
    )


def _describe(whole: bool, classes: int, parts: list[str], held: Mapping[str, Size]) -> str:
    if not whole:
        head = ", predictor and head" if classes else " and predictor"
        return (
            "the encoder starts both networks; the heads there have other shapes, so the "
            f"projector{head} are drawn"
        )
    if not classes:
        return "all networks are taken"
    if "online.classifier" in parts:
        return f"all networks are taken, and the online head of {classes} classes"
    there = next(iter(held.get("online.classifier.weight", ())), 0)
    return (
        "all networks are taken; the online head is drawn, because it has "
        f"{there} classes there and {classes} here"
    )


def _shapes(network: nn.Module) -> dict[str, Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


def _name_fields(config: BackboneConfig) -> dict[str, object]:
    """Return the kind of an encoder and its fields, by the names that recipe.json has."""
    named = {f"{_KIND}.{name}": value for name, value in asdict(config).items()}
    return {_KIND: type(config).__name__, **named}


def _other_encoder(place: str, there: Mapping[str, object], own: BackboneConfig) -> InputError:
    """Return the error that names the fields in which the encoder there is another one."""
    mine = _name_fields(own)
    if there.get(_KIND) != mine[_KIND]:
        return InputError(
            f"{place}: is of another kind of encoder (there {shown(there.get(_KIND))}, here "
            f"{mine[_KIND]}): use a recipe file with model=BYOLConfig(encoder={_spell(there)}) for "
            "these weights"
        )
    other = {name: there[name] for name, value in mine.items() if there.get(name, value) != value}
    if not other:
        return InputError(f"{place}: is damaged: it does not hold the encoder that it names")
    listed = "; ".join(f"{n}: there {shown(v)}, here {shown(mine[n])}" for n, v in other.items())
    mend = " ".join(as_option(name, value) for name, value in other.items())
    return InputError(f"{place}: is of another encoder ({listed}): give {mend}")


def _spell(there: Mapping[str, object]) -> str:
    """Return the Python that makes the config of an encoder, without the fields' defaults."""
    kind = ENCODERS.get(str(there.get(_KIND)), ResNetConfig)
    plain = _name_fields(kind())
    given = [
        f"{name.rpartition('.')[2]}={shown(there[name])}"
        for name, value in plain.items()
        if name != _KIND and there.get(name, value) != value
    ]
    if kind is TorchvisionConfig:
        given = [f"name={shown(there.get(f'{_KIND}.name'))}"]
    return f"{kind.__name__}({', '.join(given)})"
