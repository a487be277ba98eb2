"""Read tensors from files of torch.save and safetensors without running code in them."""

import argparse
import io
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from shards.errors import InputError
from shards.storage import files

# A checkpoint has no network below these keys.
_NO_NETWORK = re.compile(
    r"optimi[sz]er|^optim$|scheduler|scaler|hyper_?parameters|^(amp|callbacks|loops)$", re.I
)


def read_tensors(url: str) -> dict[str, Tensor]:
    """Read every tensor in a file of safetensors or torch.save.

    The state of optimizers and the like is left out. No code in the file is run.

    Returns:
        The tensors by dotted name, which is their path in nested dicts and lists. They have the
        file's order. Those of safetensors, which has no order, are sorted by name.

    Raises InputError when the file is missing, damaged or has no tensors, or when it has objects
    that could run code. Raises OSError when storage fails.
    """
    place = files.redact(url)
    try:
        content = files.read(url)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{place}: no such file") from None
    if not content:
        raise InputError(f"{place}: is empty")
    if place.endswith(".safetensors") or content[8:9] == b"{":  # after the header's length
        try:
            found = sorted(safetensors.torch.load(content).items())
        except Exception as error:  # a damaged file can raise nearly anything
            reason = " ".join(str(error).split())
            raise InputError(f"{place}: is not a whole safetensors file: {reason}") from None
    else:
        try:
            found = list(_flatten(_unpickle(content, place)))
        except RecursionError:
            raise InputError(f"{place}: is nested too deeply for a checkpoint") from None
    for name, tensor in found:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
            raise InputError(f"{place}: {name} is sparse, nested or without values: save it dense")
    if not found:
        raise InputError(f"{place}: holds no tensors of a network: give a state dict")
    return dict(found)


def _unpickle(content: bytes, place: str) -> object:
    archive = content.startswith(b"PK")
    if not archive and not content.startswith(b"\x80"):  # neither a zip file nor a pickle
        raise InputError(
            f"{place}: was written neither by torch.save nor by safetensors: it begins with "
            f"{content[:24]!r}"
        )
    if archive and b"/constants.pkl" in content:
        raise InputError(
            f"{place}: is a TorchScript archive: save its state dict alone, by "
            "torch.save(torch.jit.load(...).state_dict(), ...)"
        )
    try:
        if (
            archive and zipfile.ZipFile(io.BytesIO(content)).testzip()
        ):  # torch does not check the CRCs
            raise ValueError
        with (
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        other = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, UnpicklingError) and other:
            raise InputError(
                f"{place}: holds {other[1]}, which is not loaded, because it could run code: save "
                "the state dict alone where the file was made, by "
                'torch.save(torch.load(...)["state_dict"], ...)'
            ) from None
        raise InputError(
            f"{place}: is not a whole file of torch.save: it is cut off, damaged or of another kind"
        ) from None


def _flatten(root: object) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()  # a container may hold itself, or be held a million times

    def walk(value: object, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        items: Iterable[tuple[Any, object]] = ()
        if isinstance(value, Mapping) and "param_groups" not in value:  # an optimizer has these
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        if id(value) in seen:
            return
        seen.add(id(value))
        for key, below in items:
            if isinstance(below, Tensor):
                yield ".".join((*path, str(key))), below.detach()
            elif not _NO_NETWORK.search(str(key)):
                yield from walk(below, (*path, str(key)))

    return walk(root, ())
