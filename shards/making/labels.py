"""Turn the texts of labels into class indices."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.errors import InputError
from shards.index import MOST_CLASSES
from shards.samples import parse_index
from shards.storage import files

_MANY = 20  # More different labels than these are doubted when they are half of all.


class Labels(NamedTuple):
    """The labels of a data set."""

    numbers: NDArray[np.int64]  # [N] class indices, -1 without a label
    classes: list[str]
    named: bool  # whether the texts are names of classes
    warnings: list[str]  # each of one line


def number_labels(
    texts: list[str],
    classes: list[str] | None,
    known: list[str],
    place: str,
    *,
    as_names: bool = False,
) -> Labels:
    """Number the classes of a data set.

    The texts are class indices if any of them is one. Otherwise they are names, which are numbered
    in the order of `classes`, or else of the alphabet. Raises InputError when `classes` does not
    fit.

    Args:
        texts: [N] The text of each sample's label, "" without one.
        classes: The names that the user gives, or None.
        known: The names in an index that stands there, which are kept if there are enough of them.
        place: What holds the data set, for messages.
        as_names: The texts are names, even those that look like class indices.
    """
    if as_names:
        return _number_names(texts, sorted(set(texts) - {""}), classes, place)
    distinct = sorted(set(texts))
    indices = {text: parse_index(text) for text in distinct}
    names = [text for text in distinct if indices[text] is None]
    if names and not any(number is not None and number >= 0 for number in indices.values()):
        return _number_names(texts, names, classes, place)
    numbers = np.array([_or_none(indices[text]) for text in texts], np.int64)
    count = int(numbers.max(initial=-1)) + 1
    if count > MOST_CLASSES:
        sample = int(numbers.argmax()) + 1
        raise InputError(
            f"{place}: the label {count - 1} of sample {sample:,} of {len(texts):,} is no class "
            f"index, which is below {MOST_CLASSES:,}: correct it, or give another --label"
        )
    if classes is not None and len(classes) < count:
        raise InputError(f"--classes names {len(classes)} classes, but .cls goes up to {count - 1}")
    if classes is None:
        classes = known if len(known) >= count > 0 else [str(i) for i in range(count)]
    return Labels(numbers, classes if count else [], False, _odd_labels(texts, names))


def _number_names(
    texts: list[str], names: list[str], classes: list[str] | None, place: str
) -> Labels:
    if len(names) > MOST_CLASSES:
        raise InputError(f"{place}: {len(names):,} different labels are no classes")
    if classes is not None:
        _check_names(names, classes)
    classes = names if classes is None else classes
    places = {name: i for i, name in enumerate(classes)}
    numbers = np.array([places.get(text, -1) for text in texts], np.int64)
    warnings = []
    if len(names) > max(_MANY, len(texts) // 2):
        warnings.append(
            f"{len(names):,} different labels, such as {names[0]!r}: are they captions?"
        )
    return Labels(numbers, classes, True, warnings)


def _check_names(names: list[str], classes: list[str]) -> None:
    """Raise InputError unless the user's `classes` give each of the names one number."""
    if odd := sorted(set(names) - set(classes)):
        raise InputError(f"--classes does not name {odd[0]!r}, which is the label of a sample")
    if twice := [name for name, number in Counter(classes).items() if number > 1 and name in names]:
        raise InputError(f"--classes names {twice[0]!r} twice, so its labels have no one number")


def read_class_names(url: str) -> list[str]:
    """Read a file with the name of each class, one a line.

    Raises InputError when there is no such file, when it is no text, and when a line before the
    last name is empty, because all names after it would get a wrong number.
    """
    place = f"--classes {files.redact(url)}"
    try:
        text = files.read(url).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{place}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{place}: is no text in UTF-8") from None
    lines = text.rstrip().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    names = [line.strip() for line in lines]
    if "" in names:
        raise InputError(f"{place}: line {names.index('') + 1} is empty, but each names a class")
    return names


def _or_none(number: int | None) -> int:
    return -1 if number is None else number


def _odd_labels(texts: list[str], names: list[str]) -> list[str]:
    """Warn of texts among class indices that are no class indices."""
    odd = set(names)
    count = sum(text in odd for text in texts) if odd else 0
    if not count:
        return []
    are = "label is no class index" if count == 1 else "labels are no class indices"
    return [f"{count:,} {are} as the others are, such as {names[0]!r}"]
