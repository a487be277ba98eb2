"""Read the files of torch.save without running code in them, in memory that their size bounds.

torch.load believes what a file says of its tensors before it looks at their values. A file of 400
bytes can so take any amount of memory, with its restricted unpickler too. Here a storage is what
lies in the file, and a tensor is a view of it.
"""

import io
import math
import zipfile
from collections.abc import Callable

import torch
from torch import Tensor

from engine.state import pickles
from engine.state.pickles import Global, Object

_MAGIC = 0x1950A86A20F9469CFC6C  # of the files that were written before torch 1.6
_LARGEST = 2**62  # of a size, in elements
_MOST_DIMENSIONS = 64
_REBUILD = "torch._utils"
_VIEWS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
_WRAPPERS = {"_rebuild_parameter", "_rebuild_parameter_with_state"}  # the tensor comes first
_OF_SUBCLASS = Global("torch._tensor", "_rebuild_from_type_v2")

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}

_PLAIN_NAMES = {
    *("collections.OrderedDict", "collections.Counter", "_codecs.encode", "argparse.Namespace"),
    *("builtins.set", "builtins.bytearray", "builtins.complex", "torch.nn.parameter.Parameter"),
    *("torch.Size", "torch.device", "torch.serialization._get_layout", str(_OF_SUBCLASS)),
}


class NoPlainTensor(ValueError):
    """A tensor is sparse, nested, quantized or without values."""


class NotAdmitted(ValueError):
    """A file names something that is no tensor or plain container. The text is that name."""


def admit(module: str, name: str) -> None:
    """Raise NotAdmitted unless this is a name that torch's restricted unpickler takes too."""
    whole = f"{module}.{name}"
    of_torch = module in ("torch", "torch.cuda", "torch.storage") and (
        name.endswith(("Storage", "Tensor"))
        or isinstance(getattr(torch, name, None), torch.dtype | torch.qscheme)
    )
    rebuilds = module == _REBUILD and name.startswith("_rebuild_")
    if not (of_torch or rebuilds or whole in _PLAIN_NAMES):
        raise NotAdmitted(whole)


class TorchFile:
    """The content of a file of torch.save: its `root`, in the records of pickles.py."""

    def __init__(self, content: bytes) -> None:
        """Read all but the tensors.

        Raises ValueError or another exception for a damaged file, and NotAdmitted.
        """
        self._values: dict[str, Tensor] = {}  # uint8 [bytes] of each storage that was read
        self._read: Callable[[str], Tensor]
        if content.startswith(b"PK"):
            archive = _Archive(content)
            self.root, _, _ = pickles.load(archive.pickle(), admit)
            self._read = archive.read
        else:
            self.root, storages = _read_old(content)
            self._read = storages.__getitem__

    def tensor(self, value: object) -> Tensor | None:
        """Return the tensor that a record stands for; None when it stands for something else.

        Raises ValueError when it is damaged or claims more than the file has, and NoPlainTensor.
        """
        for _ in range(4):  # a tensor may be wrapped as a parameter and as a subclass
            if not isinstance(value, Object):
                return None
            if value.kind == _OF_SUBCLASS:
                function, _, args, *_ = value.args
                if not isinstance(function, Global) or not isinstance(args, tuple):
                    raise ValueError("a tensor of no known class")
                value = Object(function, args)
            if value.kind.module != _REBUILD:
                return None
            if value.kind.name in _VIEWS:
                return self._view(value)
            if value.kind.name not in _WRAPPERS:
                raise NoPlainTensor(value.kind.name)
            value = value.args[0]
        raise ValueError("a tensor that is wrapped too often")

    def _view(self, record: Object) -> Tensor:
        storage, offset, size, stride, *more = record.args
        dtype = None
        if record.kind.name == "_rebuild_tensor_v3":
            dtype = getattr(torch, more[2].name) if isinstance(more[2], Global) else None
        key, stored, count, first = _claim(storage)
        dtype = stored if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError("a tensor of no dtype")
        if key not in self._values:
            self._values[key] = self._read(key)
        values = self._values[key]
        if count * stored.itemsize > len(values):
            raise ValueError(f"a tensor claims {count} values, and the file has fewer")
        length = count * stored.itemsize // dtype.itemsize
        (offset,) = _naturals((offset,))
        size, stride = _naturals(size), _naturals(stride)
        _check_extent(size, stride, offset, length)
        whole = values[: length * dtype.itemsize]
        typed = whole.view(dtype) if length else torch.empty(0, dtype=dtype)
        base = first * stored.itemsize // dtype.itemsize
        if base:
            _check_extent(size, stride, base + offset, length)
        return typed.as_strided(size, stride, base + offset)


def _claim(storage: object) -> tuple[str, torch.dtype, int, int]:
    """Return a storage's key, dtype, number of values, and the first of them that is used."""
    if not isinstance(storage, Object) or storage.kind != pickles.PERSISTENT:
        raise ValueError("a tensor without a storage")
    (name,) = storage.args
    if not isinstance(name, tuple) or len(name) not in (5, 6) or name[0] != "storage":
        raise ValueError("no name of a storage")
    _, kind, key, _, count, *view = name
    if not isinstance(kind, Global) or kind.name not in _DTYPES or type(key) is not str:
        raise ValueError("a storage of no known type")
    first = view[0][1] if view and isinstance(view[0], tuple) and len(view[0]) == 3 else 0
    count, first = _naturals((count, first))
    return key, _DTYPES[kind.name], count, first


def _naturals(value: object) -> tuple[int, ...]:
    if isinstance(value, Object) and value.kind == Global("torch", "Size") and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple | list) or len(value) > _MOST_DIMENSIONS:
        raise ValueError("no sizes of a tensor")
    if any(type(n) is not int or not 0 <= n < _LARGEST for n in value):
        raise ValueError("sizes that no tensor has")
    return tuple(value)


def _check_extent(size: tuple[int, ...], stride: tuple[int, ...], offset: int, length: int) -> None:
    """Raise ValueError unless the tensor lies in its storage of `length` values, each used once.

    A view that repeats its values would ask for any amount of memory once it is copied.
    """
    if len(size) != len(stride):
        raise ValueError("a tensor whose strides are not those of its sizes")
    count = math.prod(size)
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if count and (reach > length or count > length):
        raise ValueError(f"a tensor claims {count} values, and its storage has {length}")


class _Archive:
    """The zip file that torch.save writes. Its entries are stored as they are."""

    def __init__(self, content: bytes) -> None:
        """Raises errors of many kinds for a damaged file."""
        self._zip = zipfile.ZipFile(io.BytesIO(content))
        entries = self._zip.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise ValueError("its entries are compressed, which torch.save does not do")
        if any(e.file_size != e.compress_size for e in entries) or (
            sum(e.file_size for e in entries) > len(content)
        ):
            raise ValueError("its entries claim more bytes than the file has")
        found = [e.filename for e in entries if e.filename.rpartition("/")[2] == "data.pkl"]
        self._home = found[0].removesuffix("data.pkl")
        order = f"{self._home}byteorder"
        if order in self._zip.namelist() and self._zip.read(order) != b"little":
            raise ValueError("it was written by a machine of another byte order")

    def pickle(self) -> bytes:
        return self._zip.read(f"{self._home}data.pkl")  # this checks the CRC32, as torch does not

    def read(self, key: str) -> Tensor:
        return _as_values(self._zip.read(f"{self._home}data/{key}"))


def _as_values(content: bytes) -> Tensor:
    """Return a copy of the bytes as a tensor, uint8 [bytes]."""
    if not content:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _read_old(content: bytes) -> tuple[object, dict[str, Tensor]]:
    """Read a file that was written before torch 1.6: pickles, and then the storages' values."""
    magic, at, _ = pickles.load(content, admit)
    if magic != _MAGIC:
        raise ValueError("no file of torch.save")
    _, at, _ = pickles.load(content, admit, at)  # the number of the protocol
    system, at, _ = pickles.load(content, admit, at)
    if not isinstance(system, pickles.Pairs) or ("little_endian", True) not in system:
        raise ValueError("it was written by a machine of another byte order")
    root, at, named = pickles.load(content, admit, at)
    dtypes = {key: dtype for key, dtype, _, _ in map(_claim, named)}
    keys, at, _ = pickles.load(content, admit, at)
    if not isinstance(keys, list):
        raise ValueError("no list of storages")
    storages = {}
    for key in keys:
        if type(key) is not str:
            raise ValueError("no name of a storage")
        start = at + 8
        count = int.from_bytes(content[at:start], "little")
        at = start + count * dtypes[key].itemsize
        if at > len(content):
            raise ValueError(f"a storage claims {count} values, and the file has fewer")
        storages[key] = _as_values(content[start:at])
    return root, storages
