"""Read the file that names the class of each image: CSV, TSV, or lines of a name and a label."""

import csv
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

from shards.errors import InputError
from shards.making.columns import LABELS, choose_column
from shards.making.table_names import Name, list_keys, parse_name
from shards.samples import EXTENSIONS, parse_index
from shards.storage import files

_DELIMITERS = "\t;,"
# Kaggle's tables of ImageNet give a class and a box for each object in an image.
_BOXES = "PredictionString"
_ONE_CLASS = re.compile(r"(\S+)( -?\d+){4}( \1( -?\d+){4})*")

_Rows = list[list[str]]


class Table(NamedTuple):
    """A table of the classes of images."""

    columns: tuple[str, str]  # that hold the names of images and the labels
    names: list[str]  # [N]
    labels: list[str]  # [N]


def read_table(url: str, place: str, images: list[Name], column: str) -> Table:
    """Read a table. The column that names most of `images` is that of names.

    Its first row is a header unless it names an image or holds numbers alone. Without a header,
    columns have numbers.

    Args:
        place: The file, for messages.
        column: The column of labels, in small letters; "" when it is to be found.

    Raises InputError when there is no such file, when it is no text, when it names none of the
    images, and when the column of labels is missing or could be one of several.
    """
    known = {key for image in images for key in list_keys(image)}
    rows, names_at = _find_names(_read_text(url, place), known, place)
    if not rows:
        raise InputError(f"{place}: names no image of SOURCE, such as {'/'.join(images[0])}")
    if odd := [n for n, row in enumerate(rows, 1) if len(row) > len(rows[0])]:
        raise InputError(
            f"{place}: row {odd[0]} has {len(rows[odd[0] - 1])} fields, and the first row has "
            f"{len(rows[0])}: put fields in quotes that hold what parts fields"
        )
    numbers = [str(number) for number in range(1, len(rows[0]) + 1)]
    columns = numbers
    if _is_header(rows[0], known):
        columns = [cell or number for cell, number in zip(rows.pop(0), numbers, strict=True)]
    for row in rows:
        row += [""] * (len(columns) - len(row))
    filled = [name for at, name in enumerate(columns) if any(row[at] for row in rows)]
    others = [name for name in filled if name != columns[names_at]]
    named = [name for name in others if name.lower() in LABELS]
    label = choose_column(column, named or others, columns, "label", place)
    if not label:
        raise InputError(f"{place}: names images, but no class of them")
    at = columns.index(label)
    labels = [_read_label(row[at], label, place) for row in rows]
    return Table((columns[names_at], label), [row[names_at] for row in rows], labels)


def _read_text(url: str, place: str) -> str:
    try:
        return files.read(url).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{place}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{place}: is a folder: give the file") from None
    except UnicodeDecodeError:
        raise InputError(f"{place}: is no text in UTF-8: save it as such") from None


def _find_names(text: str, known: set[str], place: str) -> tuple[_Rows, int]:
    """Return the rows and the column that names most of the images; no rows if none does.

    What parts the fields is what lets most images be found.

    Raises InputError when lines hold a label alone.
    """
    best: tuple[_Rows, int] = ([], 0)
    most = width = 0
    for cells in _split_lines(text, place):
        rows = [[cell.strip() for cell in row] for row in cells]
        rows = [row for row in rows if any(row)]
        for column in range(len(rows[0]) if rows else 0):
            found = {_last(row[column]) for row in rows if len(row) > column}
            width = max(width, column + 1)
            if (number := len(found & known)) > most:
                best, most = (rows, column), number
    if width == 1:
        raise InputError(
            f"{place}: its lines hold one field each, so no label stands beside the name of its "
            "image: give a table of both (shards/README.md has the lines that make ImageNet's)"
        )
    return best


def _split_lines(text: str, place: str) -> Iterator[_Rows]:
    """Yield the rows of a file, in each way to part the fields that its first line allows.

    Fields that spaces part are two: a name or a label may hold spaces too.
    """
    first = text.lstrip().partition("\n")[0]
    for delimiter in _DELIMITERS:
        if delimiter in first:
            stream = io.StringIO(text, newline="")
            try:
                yield list(csv.reader(stream, delimiter=delimiter, skipinitialspace=True))
            except csv.Error as error:
                raise InputError(f"{place}: {error}") from None
    lines = list(io.StringIO(text, newline=None))
    yield [line.split(maxsplit=1) for line in lines]
    yield [line.rsplit(maxsplit=1) for line in lines]


def _is_header(row: list[str], known: set[str]) -> bool:
    if all(parse_index(cell) is not None for cell in row):
        return False
    return not any(_last(cell) in known or _is_image(cell) for cell in row)


def _last(cell: str) -> str:
    return parse_name(cell)[-1]


def _is_image(cell: str) -> bool:
    return "." in cell and cell.rpartition(".")[2].lower() in EXTENSIONS


def _read_label(cell: str, column: str, place: str) -> str:
    """Return the text of a label, "" for none."""
    if parse_index(cell) == -1:
        return ""
    if column != _BOXES:
        return cell
    found = _ONE_CLASS.fullmatch(cell)
    if found is None:
        raise InputError(f"{place}: {cell!r} is not one class with its boxes: give one class")
    return found[1]
