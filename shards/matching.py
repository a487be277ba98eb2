"""Tell whether two data sets, of which one is measured on the other, belong together."""

from shards.errors import InputError
from shards.index import Index


def check_same_classes(
    train: Index, val: Index, names: tuple[str, str] = ("data.train", "data.val")
) -> None:
    """Raise InputError unless a label means the same class in both data sets.

    `names` are the fields that gave them, for the message.
    """
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        how = f"{odd[0]} is a class of one only" if odd else "they are in another order"
        raise InputError(
            f"{names[1]} has other classes than {names[0]} ({len(val.classes)} and "
            f"{len(train.classes)}, {how}): pack both with the same class folders"
        )


def compare_images(
    train: Index, val: Index, names: tuple[str, str] = ("data.train", "data.val")
) -> str:
    """Return a warning when two data sets have the same images; else "".

    `names` are the fields that gave them.
    """
    if train.content != val.content:
        return ""
    return (
        f"{names[0]} and {names[1]} are the same images, so each one finds itself and figures are "
        "too high: give two sets of other images"
    )


def compare_windows(
    train: Index, val: Index, names: tuple[str, str] = ("data.train", "data.val")
) -> str:
    """Return a warning when two data sets were packed with different windows; else "".

    `names` are the fields that gave them.
    """
    windows = [part.pixels.get("window", "none") for part in (train, val)]
    if windows[0] == windows[1]:
        return ""
    fields, there = (" and ".join(map(str, pair)) for pair in (names, windows))
    return f"{fields} were packed with other windows ({there}): pack both with the same --window"
