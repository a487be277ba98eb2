"""Read parquet files of images, the form in which the Hugging Face Hub keeps data sets.

A parquet file stores the images of many rows in one compressed piece, so no image of it can be read
alone. `unpack` writes the images and their labels to a tar, which is packed like any other.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from threading import Event
from typing import Any, NamedTuple

from shards.errors import InputError
from shards.making.columns import LABELS, choose_column, list_columns
from shards.making.convert import packed_extension
from shards.making.left_out import Reasons, leave_out
from shards.making.pack import plain_stem
from shards.samples import EXTENSIONS, LABEL_FIELD, Layout
from shards.storage import files
from shards.tar import TarError

_ROWS = 64  # are read at a time
_BUFFER = 1 << 22  # bytes of a column that are read at a time, however long it is
_NO_IMAGE = "rows without an image"
_PATH_ALONE = "rows whose image is the path of a file, and not its content"


class Columns(NamedTuple):
    """The columns of a parquet file that are packed."""

    image: str
    label: str  # "" when the file has none
    classes: list[str]  # what the numbers in `label` stand for; empty when the file does not say


def unpack(
    url: str, path: str, layout: Layout, left_out: Reasons, name: str, stop: Event
) -> list[str]:
    """Write the images and labels of a parquet file to a local tar, but end early at `stop`.

    Return the names of its classes, which are none when the file does not say.

    Args:
        layout: Its `image` and `label` name the columns. Without names, they are found.
        left_out: Takes the rows that have no image.
        name: The file's name, for examples of such rows.

    Raises FileNotFoundError, TarError when the file is damaged, OSError when the disk is full, and
    InputError when a column is missing or could be one of several.
    """
    place = f"SOURCE {files.redact(url)}"
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(
            f"{place}: a parquet file needs `pip install 'byol-engine[parquet]'`"
        ) from None
    with files.open_reader(url) as file, tarfile.open(path, "w") as tar:
        try:
            table = ParquetFile(file, buffer_size=_BUFFER)
            columns = _choose_columns(table.schema_arrow, layout, place)
            for key, row in enumerate(_read_rows(table, columns)):
                if stop.is_set():
                    break
                _add_row(tar, key, *row, left_out, name)
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            # A failure of the store or the disk has a number or names the URL.
            own = isinstance(error, OSError) and (error.errno or files.redact(url) in str(error))
            if own:
                raise
            raise TarError(str(error).partition("\n")[0]) from None
    return columns.classes


def _read_rows(table: Any, columns: Columns) -> Iterator[tuple[Any, Any]]:
    """Yield the image and the label of each row, None for what is missing."""
    names = [name for name in columns[:2] if name]
    for batch in table.iter_batches(_ROWS, columns=names):
        images = batch.column(columns.image).to_pylist()
        labels = batch.column(columns.label).to_pylist() if columns.label else [None] * len(images)
        yield from zip(images, labels, strict=True)


def _add_row(
    tar: tarfile.TarFile, number: int, image: Any, label: Any, left_out: Reasons, name: str
) -> None:
    """Add a row's image and label to a tar, by a name that tells the row's number."""
    path = ""
    if isinstance(image, dict):
        path = image.get("path") or ""
        image = image["bytes"]
    if not image:
        leave_out(left_out, _PATH_ALONE if path else _NO_IMAGE, f"{name}: row {number}")
        return
    stem, _, extension = path.replace("\\", "/").rpartition("/")[2].rpartition(".")
    if extension.lower() not in EXTENSIONS:
        stem, extension = f"{stem}.{extension}".strip("."), packed_extension("", image)
    key = f"{number:08d}" + (f"_{plain_stem(stem)}" if stem else "")
    _add(tar, f"{key}.{extension.lower()}", image)
    if label is not None and label == label:  # A number that is missing may be NaN.
        _add(tar, f"{key}.{LABEL_FIELD}", str(label).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _choose_columns(schema: Any, layout: Layout, place: str) -> Columns:
    """Choose the columns of the images and of the labels.

    The Hub's own description in the file names them. Without it, the column of images is the one
    that holds bytes, and that of labels goes by its name.

    Raises InputError when there is no column of images, when several could be meant, and when a
    column that the user names does not exist or holds something else.
    """

    features = _read_features(schema.metadata or {})
    kinds = {field.name: field.type for field in schema}
    images = [name for name, kind in kinds.items() if _holds_images(kind)]
    described = [name for name in images if features.get(name, {}).get("_type") == "Image"]
    image = choose_column(layout.image, described or images, list(kinds), "image", place)
    if not image:
        raise InputError(f"{place}: no column holds images: it has {list_columns(list(kinds))}")
    if image not in images:
        raise InputError(f"{place}: the column {image} holds {kinds[image]}, no image files")
    classes = {
        name: [str(one) for one in feature["names"]]
        for name, feature in features.items()
        if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }
    labels = [name for name in kinds if name in classes]
    labels = labels or [name for name in kinds if name.lower() in LABELS]
    label = choose_column(layout.label, labels, list(kinds), "label", place)
    if label and not _holds_labels(kinds[label]):
        raise InputError(
            f"{place}: the column {label} holds {kinds[label]}, no labels: name "
            "another one by --label"
        )
    return Columns(image, label, classes.get(label, []))


def _holds_images(kind: Any) -> bool:
    """Return whether a column of this type holds bytes, alone or beside the path of a file."""
    from pyarrow import types

    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        kind = kind.field(place).type if place >= 0 else kind
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_labels(kind: Any) -> bool:
    """Return whether a column of this type holds numbers or texts."""
    from pyarrow import types

    plain = kind.value_type if types.is_dictionary(kind) else kind
    tests = types.is_integer, types.is_floating, types.is_string, types.is_large_string
    return any(test(plain) for test in tests)


def _read_features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """Return what the Hub's `datasets` noted about each column; nothing when it did not."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: one for name, one in features.items() if isinstance(one, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
