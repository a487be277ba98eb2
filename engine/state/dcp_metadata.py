"""Read the `.metadata` of a checkpoint without running code in it.

torch writes it as a pickle. Here the objects of the pickle become plain records. These are checked
and then turned into objects of torch's classes. So any release of torch may have written the file.
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
    """Bytes [offset, offset + length) of a file, which store a tensor or a part of one."""

    file: str
    offset: int
    length: int


class _Record:
    """Hold the state that the pickle stores for an object, in place of that object."""

    state: Any = None

    def __init__(self, *_: object) -> None:
        """Accept any arguments, because the pickle may call these classes like functions."""

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
    # The contents of the following objects are not needed.
    (f"{_DCP}.metadata", "StorageMeta"): _Record,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("builtins", "getattr"): _Record,  # some releases of Python pickle the members of an Enum by it
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
    """Parse the metadata into torch's classes; `storage_data` maps MetadataIndex to `Place`.

    Args:
        content: The bytes of `.metadata`.
        files: The files that it may name, with their length in bytes and CRC32.

    Raises InputError unless it is well-formed metadata of plain tensors and DTensors. The message
    does not name the file; the caller adds that.
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
    # The length of this tuple differs between releases. Only the dtype, which is first, is used.
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
