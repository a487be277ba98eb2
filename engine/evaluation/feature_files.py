"""Write features with their names and labels to files of several formats, as streams."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.storage import files
from shards.storage.upload import Stream, open_writer

Format = Literal["npz", "npy", "safetensors", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
COLUMNS = ("id", "label", "class", "name")
_WITHOUT_TEXT: tuple[Format, ...] = ("npy", "safetensors")  # Their names go to a file beside them.


class Rows(NamedTuple):
    """What is known of some images, beside their features."""

    ids: list[int]  # the images' numbers in the data set
    labels: list[int]  # -1 where there is none
    names: list[str]


class Part(NamedTuple):
    """The features of some images."""

    rows: Rows
    read: Callable[[], NDArray[Any]]  # returns the features [n, ...]


class Header(NamedTuple):
    """What a file of features holds."""

    shape: tuple[int, ...]  # of the features of one image
    dtype: np.dtype[Any]
    classes: list[str]


def check_format(format: Format) -> None:
    """Raise InputError when the package that a format needs is not installed."""
    if format == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise InputError("parquet needs `pip install 'byol-engine[parquet]'`") from None


def write_features(url: str, format: Format, header: Header, parts: list[Part]) -> list[str]:
    """Write the features of all parts, in their order, to one file, and no more than one at a time.

    Return the names of the files that were written: that of `url`, and that of a CSV file with
    numbers, labels and names where the format holds no text.
    """
    writers = {
        "npy": _write_npy,
        "npz": _write_npz,
        "safetensors": _write_safetensors,
        "parquet": _write_parquet,
    }
    with open_writer(url) as stream:
        writers[format](stream, header, parts)
    written = [url.rpartition("/")[2]]
    if format in _WITHOUT_TEXT:
        beside = names_url(url)
        with open_writer(beside) as stream:
            _write_csv(stream, header, parts)
        written.append(beside.rpartition("/")[2])
    return written


def names_url(url: str) -> str:
    """Return the URL of the CSV file that lies beside a file of features."""
    return f"{url}.csv"


def as_text(name: str) -> str:
    """Return a file's name as text that every format takes: bytes that are no text are escaped."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def write_npy(url: str, header: Header, parts: list[Part]) -> list[str]:
    """Write the features alone, in the format npy, and return the file's name in a list."""
    with open_writer(url) as stream:
        _write_npy(stream, header, parts)
    return [url.rpartition("/")[2]]


def _count(parts: list[Part]) -> int:
    return sum(len(part.rows.ids) for part in parts)


def _npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    buffer = io.BytesIO()
    described = np.lib.format.dtype_to_descr(dtype)
    facts = {"descr": described, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _feature_bytes(parts: list[Part]) -> Iterator[memoryview]:
    for part in parts:
        yield _bytes(part.read())


def _write_npy(stream: Stream, header: Header, parts: list[Part]) -> None:
    stream.write(_npy_header((_count(parts), *header.shape), header.dtype))
    for content in _feature_bytes(parts):
        stream.write(content)


def _write_npz(stream: Stream, header: Header, parts: list[Part]) -> None:
    rows = _count(parts)
    names = ([as_text(name) for name in part.rows.names] for part in parts)
    longest = max((len(as_text(n)) for part in parts for n in part.rows.names), default=1)
    text = np.dtype(f"<U{max(1, longest)}")
    columns: list[tuple[str, tuple[int, ...], np.dtype[Any], Iterable[memoryview]]] = [
        ("features", (rows, *header.shape), header.dtype, _feature_bytes(parts)),
        ("ids", (rows,), np.dtype("<i8"), (_bytes(np.array(p.rows.ids, "<i8")) for p in parts)),
        (
            *("labels", (rows,), np.dtype("<i8")),
            (_bytes(np.array(p.rows.labels, "<i8")) for p in parts),
        ),
        ("names", (rows,), text, (_bytes(np.array(some, text)) for some in names if some)),
    ]
    classes = np.array([as_text(name) for name in header.classes], dtype=np.str_)
    written = [_bytes(classes)] if header.classes else []
    columns.append(("classes", classes.shape, classes.dtype, written))
    with zipfile.ZipFile(stream, "w", allowZip64=True) as archive:
        for name, shape, dtype, contents in columns:
            entry = zipfile.ZipInfo(f"{name}.npy")  # Its date is fixed, so equal runs are equal.
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as file:
                file.write(_npy_header(shape, dtype))
                for content in contents:
                    file.write(content)


def _write_safetensors(stream: Stream, header: Header, parts: list[Part]) -> None:
    rows, width = _count(parts), int(np.prod(header.shape))
    kind = {2: "F16", 4: "F32"}[header.dtype.itemsize]
    offsets = [0, 8 * rows, 16 * rows, 16 * rows + rows * width * header.dtype.itemsize]
    columns = (("ids", "I64", [rows]), ("labels", "I64", [rows]))
    described: dict[str, Any] = {
        "__metadata__": {"format": "pt", "classes": json.dumps(header.classes)}
    }
    for number, (name, type, shape) in enumerate(
        (*columns, ("features", kind, [rows, *header.shape]))
    ):
        place = offsets[number : number + 2]
        described[name] = {"dtype": type, "shape": shape, "data_offsets": place}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for column in (Rows._fields.index("ids"), Rows._fields.index("labels")):
        for part in parts:
            stream.write(_bytes(np.array(part.rows[column], "<i8")))
    for content in _feature_bytes(parts):
        stream.write(content)


def _write_parquet(stream: Stream, header: Header, parts: list[Part]) -> None:
    import pyarrow
    import pyarrow.parquet

    width = int(np.prod(header.shape))
    kind = pyarrow.float16() if header.dtype.itemsize == 2 else pyarrow.float32()
    shape = {"shape": json.dumps(header.shape)}
    fields = [
        pyarrow.field("id", pyarrow.int64()),
        pyarrow.field("label", pyarrow.int64()),
        pyarrow.field("class", pyarrow.string()),
        pyarrow.field("name", pyarrow.string()),
        pyarrow.field("features", pyarrow.list_(kind, width), metadata=shape),
    ]
    schema = pyarrow.schema(fields)
    with pyarrow.parquet.ParquetWriter(_File(stream), schema) as writer:
        for part in filter(lambda part: part.rows.ids, parts):
            flat = pyarrow.array(part.read().reshape(-1), kind)
            lists = pyarrow.FixedSizeListArray.from_arrays(flat, width)
            ids, labels, classes, names = zip(*_lines(header, part.rows), strict=True)
            columns = [list(ids), list(labels), list(classes), list(names), lists]
            writer.write_table(pyarrow.table(columns, schema=schema))


class _File(io.RawIOBase):
    """A stream in the form of a file of Python, for libraries that ask it whether it is closed."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        return self._stream.write(content)

    def tell(self) -> int:
        return self._stream.tell()


def _lines(header: Header, rows: Rows) -> Iterator[tuple[int, int, str, str]]:
    """Yield the number, label, class and name of each row."""
    for number, label, name in zip(*rows, strict=True):
        known = header.classes[label] if 0 <= label < len(header.classes) else ""
        yield number, label, as_text(known), as_text(name)


def _write_csv(stream: Stream, header: Header, parts: list[Part]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(COLUMNS)
    for part in parts:
        writer.writerows(_lines(header, part.rows))
        stream.write(buffer.getvalue().encode())
        buffer.seek(0)
        buffer.truncate()


def read_npy(url: str) -> NDArray[Any]:
    """Read a whole file of features in the format npy."""
    array: NDArray[Any] = np.load(io.BytesIO(files.read(url)), allow_pickle=False)
    return array
