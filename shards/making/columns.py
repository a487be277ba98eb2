"""Choose a column of a table by its name."""

from shards.errors import InputError

LABELS = ("label", "labels", "class", "cls", "target", "category")  # columns that hold labels


def choose_column(given: str, found: list[str], names: list[str], what: str, place: str) -> str:
    """Return the column that the user names, or the only one that was found; "" for none.

    Args:
        given: What the user names it, in small letters, or "".
        found: The columns that could be meant.
        names: All columns.
        what: The option that names it, without its dashes.
        place: The file, for messages.

    Raises InputError when there is no such column, and when several could be meant.
    """
    if given:
        name = next((name for name in names if name.lower() == given), "")
        if not name:
            raise InputError(
                f"{place}: --{what} {given}: no such column: it has {list_columns(names)}"
            )
        return name
    if len(found) > 1:
        raise InputError(f"{place}: {list_columns(found)} could be meant: name one by --{what}")
    return found[0] if found else ""


def list_columns(names: list[str]) -> str:
    """Return the names of the first columns for a message."""
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)
