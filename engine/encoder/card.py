"""Export an encoder: write files whose features equal its own, and a card that describes them."""

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from engine.encoder.classifier import count_classes
from engine.encoder.earlier import CARD, Folder, look, make_way, name_for_classifier
from engine.encoder.export import FILES, TOLERANCE, Format, convert, verify, verify_timm
from engine.encoder.hub import CONFIG, describe_network, timm_name
from engine.encoder.preprocessing import transform as transform
from engine.encoder.source import Source
from engine.encoder.torchvision_twin import recipe_lines
from engine.log import journal
from engine.method.augment import MEAN, STD, normalize
from engine.method.encoders import BackboneConfig, Encoder
from engine.method.resnet import ResNetConfig
from shards.digest import digest
from shards.errors import InputError
from shards.storage import files

WEIGHTS: tuple[Format, ...] = ("safetensors", "state-dict")  # config.json names the first of them
IMAGES = 8  # features are compared on 8 random and up to 8 real images


def sample_images(source: Source, real: Tensor | None) -> Tensor:
    """Return random images, and the real ones [n, 3, S, S] uint8: [N, 3, S, S] normalized."""
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, 3, source.size, source.size)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)]
    if real is not None:
        images.append(real)
    return normalize(torch.cat(images).float() / 255)


def write(
    source: Source,
    encoder: Encoder,
    formats: tuple[Format, ...],
    folder: Folder,
    images: Tensor,
    say: Callable[[str], None],
    classes: list[str] | None = None,
) -> None:
    """Write the files and their card to a folder.

    Files of the same weights in other formats are kept, and the card lists them too.

    Args:
        source: Where the encoder came from.
        encoder: The encoder or the classifier in evaluation mode, float32, on the CPU.
        formats: The formats to write.
        folder: The folder.
        images: [N, 3, S, S] normalized. Every file is compared with the encoder on them.
        say: Is called with a line about each file.
        classes: The names of a classifier's classes.

    Raises InputError when a file would give other features than the encoder, which is then not
    written, when the encoder's own features are all zero or not finite, and when the folder holds
    the export of other weights.
    """
    with torch.no_grad():
        features = encoder(images)
    if not features.isfinite().all() or not features.any():
        raise InputError(
            f"{files.redact(source.url)}: the encoder's features are all zero or not finite: "
            "there is nothing to export"
        )
    names = {name: _file(name, encoder) for name in dict.fromkeys(formats)}
    document = describe(source, encoder, say)
    document |= {"classes": classes or []} if count_classes(encoder) else {}
    earlier = look(folder, document, set(names.values()), say)
    compared = min(len(images), earlier.compared or len(images))
    written: dict[str, Any] = dict(earlier.kept)

    def write_card() -> str:
        url = files.join(folder.url, CARD)
        facts = {"compared_on_images": compared, "files": dict(sorted(written.items()))}
        files.write(url, json.dumps(document | facts, indent=1).encode())
        return url

    for number, (name, file) in enumerate(names.items()):
        content, difference = _convert_alike(source, encoder, name, images)
        if number == 0:
            make_way(folder, earlier, say)
            write_card()  # If this is interrupted, the same command finds the folder to be its own.
        url = files.join(folder.url, file)
        files.write(url, content)
        written[file] = {
            "format": name,
            "bytes": len(content),
            "sha256": digest(content, 64),
            "largest_difference": difference,
        }
        write_card()
        say(f"{files.redact(url)}  {len(content) / 1e6:.1f} MB, equal within {difference:.0e}")
    if kept := sorted(earlier.kept.keys() - set(names.values())):
        say(f"kept, because they are of the same weights: {', '.join(kept)}")
    timm = verify_timm(encoder.stock_state(), source.config, encoder, images)
    if timm is not None:
        say(f"timm's {timm_name(source.config)} with these weights: equal within {timm:.0e}")
    document |= {"timm_difference": timm}
    weights = [file for name in WEIGHTS if (file := _file(name, encoder)) in written]
    if weights:
        _write_config(files.join(folder.url, CONFIG), source, encoder, weights[0], classes or [])
    say(files.redact(write_card()))


def _convert_alike(
    source: Source, encoder: Encoder, name: Format, images: Tensor
) -> tuple[bytes, float]:
    """Return a file's content, and how far its features are from the encoder's.

    Raises InputError when they are too far.
    """
    content = convert(encoder, source.config, name, source.size)
    difference = verify(content, name, encoder, source.config, images)
    if not difference <= TOLERANCE:  # True for nan as well
        raise InputError(
            f"--format {name}: its features differ from the checkpoint's by {difference:.1e} "
            f"of the largest, more than {TOLERANCE:g}: not written; choose another format"
        )
    return content, difference


def _write_config(
    url: str, source: Source, encoder: Encoder, weights: str, classes: list[str]
) -> None:
    found = describe_network(source, weights, encoder, classes, count_classes(encoder))
    files.write(url, json.dumps(found, indent=1).encode())


def _file(name: Format, encoder: Encoder) -> str:
    """Return the name of a file, which says whether it is of an encoder or of a classifier."""
    return name_for_classifier(FILES[name]) if count_classes(encoder) else FILES[name]


def _head_digest(encoder: Encoder) -> dict[str, str]:
    """Return a digest of a classifier's last layer, which is not part of the run's weights."""
    if not count_classes(encoder):
        return {}
    state, name = encoder.stock_state(), encoder.classifier_name
    values = [state[f"{name}.{part}"].detach().numpy().tobytes() for part in ("weight", "bias")]
    return {"head": digest(b"".join(values))}


def describe(source: Source, encoder: Encoder, say: Callable[[str], None]) -> dict[str, Any]:
    """Describe the encoder and its input for the users of the files."""
    config = source.config
    return {
        "encoder": config.describe().removesuffix(" x1"),
        **_shape(config),
        "features": encoder.feature_dim,
        "network": source.network,
        "checkpoint": files.redact(source.url),
        "step": source.step,
        "weights": source.digest,
        **_head_digest(encoder),
        "came_from": source.report,
        "input": {
            "colours": "RGB",
            "size": source.size,
            "resize_shorter_side": round(source.size / source.crop),
            "center_crop": source.size,
            "crop_fraction": source.crop,
            "interpolation": "bicubic, no antialiasing",
            "exif_orientation": source.rules.exif,
            "max_pixels": source.rules.max_pixels,
            "scale": 1 / 255,
            "mean": MEAN,
            "std": STD,
        },
        "build": recipe_lines(config, source.size, count_classes(encoder)),
        "recipe": source.fields,
        "metrics": _metrics(source, say),
        "packages": {name: version(name) for name in ("torch", "torchvision", "safetensors")},
    }


def _shape(config: BackboneConfig) -> dict[str, Any]:
    """Return the fields of the network's config."""
    return asdict(config) if isinstance(config, ResNetConfig) else {"torchvision": config.name}


def _metrics(source: Source, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the record of this step in the run's log, or nothing where it may not be read."""
    if not source.run:
        return {}
    try:
        records = journal.read(source.run)
    except OSError as error:
        say(f"{CARD} is without the run's metrics: {error}")
        return {}
    return next((record for record in records if record["step"] == source.step), {})
