"""Files of every kind that strangers give, and ways to damage them."""

import copy
import io
import json
import random
import re
import struct
import tarfile
import zipfile
import zlib
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from shards.digest import digest

HUGE = (2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 10**30, -1, -(2**63), 0)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, 1e308, float("inf"), float("nan"), 2**62, 2**63, 10**30),
    *("", "a", "../x", "/etc/passwd", "[/x]", "\x1b[2J\n", "\ud800", "s3://a::b", "1" * 300),
    *([], {}, [[]], [[0, 1]], {"a": 1}, [1] * 100, [None]),
)


def damage(content: bytes, chance: random.Random) -> bytes:
    """Change some bytes, cut the content off, or put a piece of it at another place."""
    found = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        place = chance.randrange(len(found)) if found else 0
        kind = chance.randrange(7)
        if kind == 0 and found:
            found[place] ^= 1 << chance.randrange(8)
        elif kind == 1 and found:
            found[place] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        elif kind == 2 and chance.random() < 0.3:
            del found[place:]
        elif kind == 3:
            length = chance.choice([1, 4, 16, 512])
            other = chance.randrange(len(found) + 1)
            found[other:other] = found[place : place + length]
        elif kind == 4:
            del found[place : place + chance.choice([1, 2, 8, 512])]
        elif kind == 5:
            number = chance.choice(HUGE) & (2**64 - 1)
            size = chance.choice([2, 4, 8])
            order: Any = chance.choice(["big", "little"])
            found[place : place + size] = (number % 2 ** (8 * size)).to_bytes(size, order)
        else:
            _change_a_number(found, chance)
    return bytes(found)


def _change_a_number(found: bytearray, chance: random.Random) -> None:
    places = list(re.finditer(rb"[0-9]+", found))
    if places:
        place = chance.choice(places)
        found[slice(*place.span())] = str(chance.choice(HUGE)).encode()


def damage_json(content: bytes, chance: random.Random) -> bytes:
    """Change values of a document, and make its digest fit again; now and then, its bytes."""
    if chance.random() < 0.2:
        return damage(content, chance)
    document = json.loads(content)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        document = _swap(document, chance)
    if chance.random() < 0.8 and isinstance(document, dict) and "digest" in document:
        facts = {name: value for name, value in document.items() if name != "digest"}
        document["digest"] = digest(json.dumps(facts, sort_keys=True))
    found = json.dumps(document).encode()
    if chance.random() < 0.05:  # the first key twice
        found = re.sub(rb"^\{(.*?,)", rb"{\1\1", found)
    if chance.random() < 0.05:
        found = b"[" * 10**5 + found
    return found


def _swap(document: Any, chance: random.Random) -> Any:
    """Replace one value of the document, at any depth, or remove it."""
    if not isinstance(document, dict | list) or not document or chance.random() < 0.1:
        return copy.deepcopy(chance.choice(VALUES))
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = chance.choice(keys)
    if chance.random() < 0.1:
        del document[key]
    else:
        document[key] = _swap(document[key], chance)
    return document


# Tars ---------------------------------------------------------------------------------------------


def tar(chance: random.Random) -> bytes:
    """A tar of a few samples, with long names and PAX headers."""
    buffer = io.BytesIO()
    kind = chance.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for i in range(3):
            name = "n" * (90 if kind == tarfile.USTAR_FORMAT else 200) if i == 1 else f"{i:04d}"
            for extension, size in (("jpg", 700), ("cls", 1)):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = size
                archive.addfile(info, io.BytesIO(b"1" * size))
    return buffer.getvalue()


def damage_tar(content: bytes, chance: random.Random) -> bytes:
    """Damage a tar; most of the time, checksums of its headers are right again."""
    found = bytearray(damage(content, chance))
    if chance.random() < 0.7:
        for start in range(0, len(found) - 511, 512):
            if found[start + 257 : start + 262] == b"ustar":
                found[start + 148 : start + 156] = b" " * 8
                total = sum(found[start : start + 512])
                found[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(found)


# Images -------------------------------------------------------------------------------------------


def image(chance: random.Random) -> bytes:
    pixels = np.random.default_rng(chance.randrange(9)).integers(0, 256, (24, 31, 3), np.uint8)
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    mode = chance.choice(["RGB", "L", "RGBA", "P", "CMYK"])
    kind = chance.choice(["JPEG", "PNG", "WEBP"])
    fitting = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "RGBA", "P"), "WEBP": ("RGB",)}
    picture = picture.convert(mode if mode in fitting[kind] else "RGB")
    picture.save(buffer, kind, **({"progressive": True} if chance.random() < 0.3 else {}))
    return buffer.getvalue()


def damage_image(content: bytes, chance: random.Random) -> bytes:
    """Damage an image; the checks of a PNG's pieces are right again most of the time."""
    found = bytearray(damage(content, chance))
    if found.startswith(b"\x89PNG") and chance.random() < 0.7:
        at = 8
        while at + 12 <= len(found):
            (length,) = struct.unpack(">I", found[at : at + 4])
            end = at + 8 + length
            if end + 4 > len(found):
                break
            found[end : end + 4] = struct.pack(">I", zlib.crc32(found[at + 4 : end]))
            at = end + 4
    return bytes(found)


# Files of torch -----------------------------------------------------------------------------------


def checkpoint_file(chance: random.Random) -> bytes:
    tensors = {f"layer{i}.weight": torch.ones(2, 3) * i for i in range(3)}
    tensors["half"] = torch.zeros(3).half()
    kind = chance.randrange(3)
    if kind == 0:
        return safetensors.torch.save(tensors)
    buffer = io.BytesIO()
    content = {"state_dict": tensors, "epoch": 3, "list": [torch.zeros(2, 2).t(), (1, "a")]}
    torch.save(content, buffer, _use_new_zipfile_serialization=kind == 1)
    return buffer.getvalue()


def damage_checkpoint(content: bytes, chance: random.Random) -> bytes:
    """Damage a file of torch.save or safetensors; a zip file is made of the damaged entries."""
    if content.startswith(b"PK") and chance.random() < 0.8:
        buffer = io.BytesIO()
        kind = zipfile.ZIP_DEFLATED if chance.random() < 0.05 else zipfile.ZIP_STORED
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", kind) as new:
            for entry in old.infolist():
                part = old.read(entry)
                changed = entry.filename.endswith("data.pkl") or chance.random() < 0.1
                new.writestr(entry.filename, damage(part, chance) if changed else part)
        return buffer.getvalue()
    if content[8:9] == b"{" and chance.random() < 0.8:
        length = int.from_bytes(content[:8], "little")
        header = damage_json(content[8 : 8 + length], chance)
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    return damage(content, chance)
