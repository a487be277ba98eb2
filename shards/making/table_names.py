"""Tell which row of a table names which image: by its path or the end of it, or by its name alone.

The extension may be missing, as in many tables of Kaggle, and may be in small or capital letters.
"""

from collections import defaultdict

from shards.samples import EXTENSIONS

Name = tuple[str, ...]  # folders and the name of a file, whose extension is in small letters


def parse_name(path: str) -> Name:
    """Take a path apart. Backslashes count as slashes, because tables come from Windows too."""
    folders = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    stem, dot, extension = (folders.pop() if folders else "").rpartition(".")
    if extension.lower() in EXTENSIONS:
        extension = extension.lower()
    return (*folders, stem + dot + extension)


def list_keys(image: Name) -> tuple[str, ...]:
    """Return the names that an image may have in a table: with its extension, and without."""
    stem, _, extension = image[-1].rpartition(".")
    return (image[-1], stem) if extension in EXTENSIONS and stem else image[-1:]


def find_rows(images: list[Name], rows: list[Name]) -> list[list[int]]:
    """Return the numbers of the rows that name each image.

    As many folders as both have, from the last one on, must be the same. A row that names the whole
    path of an image names no other one, and then no other row names that image.
    """
    at: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        at[row[-1]].append(number)
    found: list[list[int]] = []
    whole: set[int] = set()
    for image in images:
        some = [n for key in list_keys(image) for n in at.get(key, ()) if _agree(image, rows[n])]
        exact = [number for number in some if len(rows[number]) == len(image)]
        whole.update(exact)
        found.append(exact or some)
    return [
        [number for number in some if number not in whole or len(rows[number]) == len(image)]
        for image, some in zip(images, found, strict=True)
    ]


def _agree(image: Name, row: Name) -> bool:
    shared = min(len(image), len(row)) - 1
    return not shared or image[-1 - shared : -1] == row[-1 - shared : -1]
