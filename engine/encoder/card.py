"""Export an encoder: write files whose features equal its own, and a card that describes them."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from engine.encoder.classifier import count_classes
from engine.encoder.export import FILES, TOLERANCE, Format, convert, verify, verify_timm
from engine.encoder.hub import CONFIG, describe_network, timm_name
from engine.encoder.preprocessing import transform as transform
from engine.encoder.source import Source
from engine.encoder.torchvision_twin import recipe_lines
from engine.log import journal
from engine.method.augment import MEAN, STD, normalize
from engine.method.encoders import BackboneConfig, Encoder
from engine.method.resnet import ResNetConfig
from shards.center_crops import CropReader
from shards.digest import digest
from shards.errors import InputError
from shards.index import Index
from shards.storage import files

CARD = "card.json"
IMAGES = 8  # features are compared on 8 random and up to 8 real images


def sample_images(source: Source, val: Index | None, report: Callable[[str], None]) -> Tensor:
    """Return random images, and real ones if `val` has some: [N, 3, S, S] normalized."""
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, 3, source.size, source.size)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)]
    if val is not None:
        crops = CropReader(
            source.size, source.crop, threads=1, corrupt=1, report=report, rules=source.rules
        )
        images += [batch.images[:IMAGES] for batch in crops.read(val, limit=IMAGES)][:1]
    return normalize(torch.cat(images).float() / 255)


def write(
    source: Source,
    encoder: Encoder,
    formats: tuple[Format, ...],
    out: str,
    images: Tensor,
    say: Callable[[str], None],
    classes: list[str] | None = None,
) -> None:
    """Write the files and then the card to the folder `out`.

    Args:
        source: Where the encoder came from.
        encoder: The encoder or the classifier in evaluation mode, float32, on the CPU.
        formats: The formats to write.
        out: URL of the folder.
        images: [N, 3, S, S] normalized. Every file is compared with the encoder on them.
        say: Is called with a line about each file.
        classes: The names of a classifier's classes.

    Raises InputError when a file would give other features than the encoder, which is then not
    written, and when the encoder's own features are all zero or not finite.
    """
    with torch.no_grad():
        features = encoder(images)
    if not features.isfinite().all() or not features.any():
        raise InputError(
            f"{files.redact(source.url)}: the encoder's features are all zero or not finite: "
            "there is nothing to export"
        )
    names = {name: _file(name, encoder) for name in dict.fromkeys(formats)}
    # Files that an earlier export left do not belong to the new card.
    once = cache(say)
    ours = {CARD, CONFIG, *FILES.values(), *(_classifier(name) for name in FILES.values())}
    for stale in [CARD, *sorted(ours - {CARD} - set(names.values()))]:
        files.discard_or_empty(files.join(out, stale), out, once)
    written = {}
    for name, file in names.items():
        content = convert(encoder, source.config, name, source.size)
        difference = verify(content, name, encoder, source.config, images)
        if not difference <= TOLERANCE:  # True for nan as well
            raise InputError(
                f"--format {name}: its features differ from the checkpoint's by {difference:.1e} "
                f"of the largest, more than {TOLERANCE:g}: not written; choose another format"
            )
        url = files.join(out, file)
        files.write(url, content)
        written[file] = {
            "format": name,
            "bytes": len(content),
            "sha256": digest(content, 64),
            "largest_difference": difference,
        }
        say(f"{files.redact(url)}  {len(content) / 1e6:.1f} MB, equal within {difference:.0e}")
    timm = verify_timm(encoder.stock_state(), source.config, encoder, images)
    if timm is not None:
        say(f"timm's {timm_name(source.config)} with these weights: equal within {timm:.0e}")
    document = describe(source, encoder, len(images), say)
    document |= {"files": written, "timm_difference": timm}
    document |= {"classes": classes or []} if count_classes(encoder) else {}
    weights = [names[name] for name in ("safetensors", "state-dict") if name in names]
    if weights:
        _write_config(files.join(out, CONFIG), source, encoder, weights[0], classes or [])
    url = files.join(out, CARD)
    files.write(url, json.dumps(document, indent=1).encode())
    say(files.redact(url))


def _write_config(
    url: str, source: Source, encoder: Encoder, weights: str, classes: list[str]
) -> None:
    found = describe_network(source, weights, encoder, classes, count_classes(encoder))
    files.write(url, json.dumps(found, indent=1).encode())


def _file(name: Format, encoder: Encoder) -> str:
    """Return the name of a file, which says whether it is of an encoder or of a classifier."""
    return _classifier(FILES[name]) if count_classes(encoder) else FILES[name]


def _classifier(file: str) -> str:
    return file.replace("encoder", "classifier")


def describe(
    source: Source, encoder: Encoder, compared: int, say: Callable[[str], None]
) -> dict[str, Any]:
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
        "compared_on_images": compared,
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
