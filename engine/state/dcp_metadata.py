"""The `.metadata` of a checkpoint, of which nothing is run.

torch writes it as a pickle. Here its objects become plain records, which are checked, then made
into torch's own; so it does not matter either which release of torch wrote it.
"""

import io
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shards.errors import InputError

NAME = ".metadata"


class Place(NamedTuple):
    """Where a tensor, or a part of one, is stored: bytes [offset, offset + length) of a file."""

    file: str
    offset: int
    length: int


class _Record:
    """An object of the pickle: the state that was stored, in place of what it would become."""

    state: Any = None

    def __init__(self, *_: object) -> None:
        """The pickle may call any of these classes, as a function or to make an object."""

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Metadata(_Record):
    pass


class _Tensor(_Record):
    pass


class _Properties(_Record):
    pass


class _Chunk(_Record):
    pass


class _Index(_Record):
    pass


class _Info(_Record):
    pass


_DCP = "torch.distributed.checkpoint"
_ADMITTED: dict[tuple[str, str], type] = {
    (f"{_DCP}.metadata", "Metadata"): _Metadata,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_DCP}.metadata", "TensorProperties"): _Properties,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_DCP}.metadata", "MetadataIndex"): _Index,
    (f"{_DCP}.filesystem", "_StorageInfo"): _Info,
    ("torch", "Size"): tuple,
    # Of these the contents are not needed.
    (f"{_DCP}.metadata", "StorageMeta"): _Record,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("builtins", "getattr"): _Record,  # how some releases of Python pickle an enumeration's member
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in _ADMITTED:
            raise InputError(
                f"names {module}.{name}, which no checkpoint of this engine has: "
                "the file is damaged or malicious"
            )
        return _ADMITTED[module, name]


def parse(content: bytes, files: Mapping[str, tuple[int, int]]) -> Metadata:
    """The metadata in torch's classes; its `storage_data` is a `Place` for each MetadataIndex.

    Args:
        files: The names that it may mention, with length in bytes (and CRC32).

    Raises InputError, without a place, for all but well-formed metadata of plain tensors and
    DTensors.
    """
    try:
        root = _fields(_Unpickler(io.BytesIO(content)).load(), _Metadata)
        tensors: Any = {str(name): _tensor(e) for name, e in root["state_dict_metadata"].items()}
        places = {_index(k): _place(e, files) for k, e in root["storage_data"].items()}
        paths = {str(name): tuple(path) for name, path in (root["planner_data"] or {}).items()}
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(f"is damaged: {type(error).__name__}: {error}") from None
    return Metadata(tensors, paths, places)


def _fields(record: object, kind: type[_Record]) -> dict[str, Any]:
    if type(record) is not kind:
        raise TypeError(f"{type(record).__name__} in place of {kind.__name__}")
    state: dict[str, Any] = record.state
    return state


def _tensor(record: object) -> TensorStorageMetadata:
    fields = _fields(record, _Tensor)
    # A tuple whose length differs between releases; all after the dtype goes unused.
    dtype, *_ = _fields(fields["properties"], _Properties)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{type(dtype).__name__} in place of a dtype")
    chunks = [_fields(chunk, _Chunk) for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        torch.Size(fields["size"]),
        [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in chunks],
    )


def _index(record: object) -> MetadataIndex:
    fields = _fields(record, _Index)
    return MetadataIndex(str(fields["fqn"]), torch.Size(fields["offset"]), fields["index"])


def _place(record: object, files: Mapping[str, tuple[int, int]]) -> Place:
    fields = _fields(record, _Info)
    file, offset, length = str(fields["relative_path"]), fields["offset"], fields["length"]
    if file not in files or "/" in file or "\\" in file:
        raise InputError(f"names the file {file!r}, which the checkpoint does not have")
    if fields.get("transform_descriptors"):
        raise InputError(f"says that {file} is encoded, which no file of this engine is")
    if offset < 0 or length < 1 or offset + length > files[file][0]:
        raise ValueError(f"{offset} + {length} bytes in a file of {files[file][0]}")
    return Place(file, int(offset), int(length))
