"""Save and load a state of many kinds of tensors through torch's distributed checkpoint."""

import importlib
import zlib
from typing import Any

import fsspec
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from engine.state.dcp_files import Reader, Sums, Writer
from shards.errors import InputError

try:
    stock: Any = importlib.import_module("torch.distributed.checkpoint.fsspec_filesystem")
except ImportError:  # Older releases (2.11) have a private name for it.
    stock = importlib.import_module("torch.distributed.checkpoint._fsspec_filesystem")

State = dict[str, Any]
FILE = "__0_0.distcp"


def plain_state(seed: int = 0) -> State:
    """Return a state that holds tensors of many kinds."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(300, 40, generator=generator)
    parts: State = {f"layer{i}": torch.randn(i, 7, generator=generator) for i in range(1, 20)}
    return parts | {
        "count": torch.tensor(seed),
        "half": wide.to(torch.bfloat16),
        "flags": wide > 0,
        "part of a larger one": wide[5:9, 3:],
        "transposed": wide.T,
        "channels last": wide.view(5, 10, 8, 30).contiguous(memory_format=torch.channels_last),
        "empty": torch.empty(0, 3),
        "nested": [{"a": wide.double()}, wide.int()],
    }


def blank(state: Any) -> Any:
    """Return a state of the same structure in which every value is 77."""
    if isinstance(state, dict):
        return {name: blank(value) for name, value in state.items()}
    if isinstance(state, list):
        return [blank(value) for value in state]
    return torch.full_like(state, 77)


def save(url: str, state: State) -> Sums:
    writer = Writer(url)
    dcp_save(state, storage_writer=writer, no_dist=True)
    return writer.sums


def load(url: str, files: Sums, state: State) -> State:
    """Load what is stored, in the structure of `state`."""
    found: State = blank(state)
    dcp_load(found, storage_reader=Reader(url, files), no_dist=True)
    return found


def fault(url: str, files: Sums, state: State) -> InputError:
    """Return the InputError that loading raises, taken out of torch's own exception."""
    with pytest.raises(CheckpointException) as caught:
        load(url, files, state)
    (cause, _), *_ = caught.value.failures.values()
    assert isinstance(cause, InputError), cause
    return cause


def plain_files(url: str) -> dict[str, bytes]:
    """Read all files below a URL, without the code of this package."""
    filesystem, path = fsspec.core.url_to_fs(url)
    found = filesystem.find(path)
    return {name.rsplit("/", 1)[-1]: filesystem.cat_file(name) for name in found}


def sums(contents: dict[str, bytes]) -> Sums:
    return {name: (len(content), zlib.crc32(content)) for name, content in contents.items()}
