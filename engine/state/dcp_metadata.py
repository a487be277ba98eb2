"""Read the `.metadata` of a checkpoint without running code in it.

torch writes it as a pickle. Here the objects of the pickle become plain records (pickles.py).
These are checked and then turned into objects of torch's classes. So any release of torch may have
written the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Interval, MaxLen
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from engine.state import pickles
from engine.state.pickles import Global, Object, Pairs
from shards.documents import Natural, build, check, shown, without_gc
from shards.errors import InputError

NAME = ".metadata"


class _Foreign(InputError):
    """The metadata is whole, but no checkpoint of this engine has such."""


class Place(NamedTuple):
    """Bytes [offset, offset + length) of a file, which store a tensor or a part of one."""

    file: str
    offset: int
    length: int


_DCP = "torch.distributed.checkpoint"
_METADATA, _TENSOR, _PROPERTIES, _CHUNK, _INDEX = (
    Global(f"{_DCP}.metadata", name)
    for name in (
        *("Metadata", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "MetadataIndex"),
    )
)
_INFO = Global(f"{_DCP}.filesystem", "_StorageInfo")
_SIZES = Annotated[tuple[Natural, ...], MaxLen(64)]
_SIZE = Global("torch", "Size")
_ADMITTED = {
    *(_METADATA, _TENSOR, _PROPERTIES, _CHUNK, _INDEX, _INFO, _SIZE),
    # The contents of the following objects are not needed.
    Global(f"{_DCP}.metadata", "StorageMeta"),
    Global(f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    Global("torch.serialization", "_get_layout"),
    Global("builtins", "getattr"),  # some releases of Python pickle the members of an Enum by it
}


@dataclass(frozen=True)
class _Stored:
    """What the metadata says of the place of a tensor or a part of one."""

    relative_path: str
    offset: Natural
    length: Annotated[int, Interval(ge=1, lt=2**62)]
    transform_descriptors: Any = None


@dataclass(frozen=True)
class _Key:
    """The name of a tensor and the part of it."""

    fqn: str
    offset: Any
    index: Natural | None = None


def _admit(module: str, name: str) -> None:
    is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
    if not is_dtype and Global(module, name) not in _ADMITTED:
        raise _Foreign(
            f"names {shown(f'{module}.{name}')[1:-1]}, which no checkpoint of this engine has: "
            "the file is damaged or malicious"
        )


@without_gc()
def parse(content: bytes, files: Mapping[str, tuple[int, int]]) -> Metadata:
    """Parse the metadata into torch's classes; `storage_data` maps MetadataIndex to `Place`.

    Args:
        content: The bytes of `.metadata`.
        files: The files that it may name, with their length in bytes and CRC32.

    Raises InputError unless it is well-formed metadata of plain tensors and DTensors. The message
    does not name the file; the caller adds that.
    """
    try:
        root = _fields(pickles.load(content, _admit)[0], _METADATA)
        tensors = {_name(key): _tensor(one) for key, one in _items(root, "state_dict_metadata")}
        places = {_index(key): _place(one, files) for key, one in _items(root, "storage_data")}
        paths = {_name(key): _path(one) for key, one in _items(root, "planner_data")}
    except _Foreign as error:
        raise InputError(str(error)) from None
    except (ValueError, TypeError, KeyError, RecursionError, MemoryError, InputError) as error:
        raise InputError(f"is damaged: {type(error).__name__}: {error}") from None
    return Metadata(tensors, paths, places)  # type: ignore[arg-type]


def _fields(record: object, kind: Global) -> dict[str, object]:
    """Return the fields of an object by name."""
    if type(record) is not Object or record.kind != kind or type(record.state) is not Pairs:
        raise TypeError(f"no {kind.name} where one must be")
    return {_name(name): value for name, value in record.state}


def _items(root: dict[str, object], name: str) -> Pairs:
    found = root[name]
    if found is None and name == "planner_data":
        return Pairs()
    if type(found) is not Pairs:
        raise TypeError(f"{name} is no dict")
    return found


def _name(value: object) -> str:
    if type(value) is not str:
        raise TypeError(f"{type(value).__name__} in place of a name")
    return value


def _path(value: object) -> tuple[str | int, ...]:
    if type(value) is not tuple or any(type(part) not in (str, int) for part in value):
        raise TypeError("no path of a tensor")
    return value


def _size(value: object) -> torch.Size:
    if type(value) is not Object or value.kind != _SIZE or len(value.args) != 1:
        raise TypeError("no torch.Size where one must be")
    found: tuple[int, ...] = check(_SIZES, value.args[0], "size")
    return torch.Size(found)


def _tensor(record: object) -> TensorStorageMetadata:
    fields = _fields(record, _TENSOR)
    properties = fields["properties"]
    if type(properties) is not Object or properties.kind != _PROPERTIES:
        raise TypeError("no TensorProperties where they must be")
    state: Any = properties.state
    # The length of this tuple differs between releases. Only the dtype, which is first, is used.
    dtype = getattr(torch, state[0].name, None) if _is_named(state) else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError("no dtype where one must be")
    if type(fields["chunks"]) is not list:
        raise TypeError("no list of chunks")
    chunks = [_fields(chunk, _CHUNK) for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(c["offsets"]), _size(c["sizes"])) for c in chunks],
    )


def _is_named(state: Any) -> bool:
    return type(state) is tuple and len(state) > 0 and type(state[0]) is Global


def _index(record: object) -> MetadataIndex:
    found = build(_Key, _fields(record, _INDEX), "storage_data")
    return MetadataIndex(found.fqn, _size(found.offset), found.index)


def _place(record: object, files: Mapping[str, tuple[int, int]]) -> Place:
    found = build(_Stored, _fields(record, _INFO), "storage_data")
    file, offset, length = found.relative_path, found.offset, found.length
    if file not in files or "/" in file or "\\" in file:
        raise _Foreign(f"names the file {shown(file)}, which the checkpoint does not have")
    if found.transform_descriptors:
        raise _Foreign(f"says that {file} is encoded, which no file of this engine is")
    if offset + length > files[file][0]:
        raise ValueError(f"{offset} + {length} bytes in a file of {files[file][0]}")
    return Place(file, offset, length)
