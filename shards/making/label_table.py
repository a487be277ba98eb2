"""Take the classes of images from a table that stands apart from them, such as train.csv."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from shards.errors import InputError
from shards.making.labels import number_labels
from shards.making.left_out import Reasons, leave_out
from shards.making.pack import ImageSet
from shards.making.table_file import Table, read_table
from shards.making.table_names import Name, find_rows, parse_name
from shards.samples import parse_index
from shards.storage import files

_NO_IMAGE = "rows of --labels that name no image of SOURCE"


def _keep(path: str) -> str:
    return path


@dataclass(frozen=True)
class LabelTable:
    """A file that names the classes of images, and how it is read."""

    url: str
    column: str = ""  # that holds the labels, in small letters; "" when it is to be found
    classes: list[str] | None = None  # the names of the classes in their order
    report: Callable[[str], None] = print  # takes a line that says what was read

    @property
    def place(self) -> str:
        return f"--labels {files.redact(self.url)}"

    def label(
        self,
        sets: list[ImageSet],
        left_out: Reasons,
        *,
        named: bool = True,
        inside: Callable[[str], str] = _keep,
    ) -> tuple[list[ImageSet], list[str]]:
        """Return data sets with the labels of the table, and lines about images without a label.

        A set keeps the labels that it has when the table names none of its images. All labels of
        the table are classes, also those that no image has, so that sets which are packed apart
        with one table have the same classes.

        Args:
            left_out: Takes the rows that name no image.
            named: Whether the labels that the sets have are names rather than numbers.
            inside: Makes the path that the table may name of an image's path.

        Raises InputError when the file cannot be read, when a row could mean several images, when
        rows contradict each other, and when the labels do not fit to those that sets keep.
        """
        names = [parse_name(inside(image.path)) for part in sets for image in part.images]
        table = read_table(self.url, self.place, names, self.column)
        found = self._match(names, table, left_out)
        number, (images, labels) = len(names) - found.count(None), table.columns
        self.report(
            f"{self.place}: the column {images} names {number:,} of {len(names):,} images, and the "
            f"column {labels} their classes"
        )
        texts, kept = _choose_texts(sets, found)
        if named and kept:
            self._check_kind(table.labels, kept)
        numbered = number_labels(
            [*texts, *kept, *table.labels],
            self.classes,
            [],
            self.place,
            as_names=named and bool(kept),
        )
        numbers = iter(numbered.numbers.tolist())
        sets = [
            _renumber(part, [next(numbers) for _ in part.images], numbered.classes) for part in sets
        ]
        return sets, [
            *numbered.warnings,
            *(line for part in sets for line in _tell_unlabeled(part)),
        ]

    def _match(self, images: list[Name], table: Table, left_out: Reasons) -> list[str | None]:
        """Return the label that the table gives each image, None where no row names it."""
        found = find_rows(images, [parse_name(name) for name in table.names])
        uses = Counter(row for rows in found for row in rows)
        for image, rows in zip(images, found, strict=True):
            if twice := [row for row in rows if uses[row] > 1]:
                raise InputError(
                    f"{self.place}: {table.names[twice[0]]} could be {uses[twice[0]]} images of "
                    f"SOURCE, such as {'/'.join(image)}: write their paths, or pack each folder "
                    "alone"
                )
            if len(labels := sorted({table.labels[row] for row in rows})) > 1:
                raise InputError(
                    f"{self.place}: {'/'.join(image)} has {len(labels)} labels, such as "
                    f"{labels[0]!r} and {labels[1]!r}: leave one"
                )
        if unused := [name for row, name in enumerate(table.names) if row not in uses]:
            leave_out(left_out, _NO_IMAGE, unused[0], len(unused))
        return [table.labels[rows[0]] if rows else None for rows in found]

    def _check_kind(self, labels: list[str], kept: list[str]) -> None:
        """Raise InputError for numbers in the table where folders name classes."""
        for label in sorted(set(labels) - set(kept)):
            if (parse_index(label) if label else None) is not None:
                raise InputError(
                    f"{self.place}: its labels are numbers, such as {label}, but folders of SOURCE "
                    f"name classes, such as {kept[0]}: write these names in the table"
                )


def _choose_texts(sets: list[ImageSet], found: list[str | None]) -> tuple[list[str], list[str]]:
    """Return the text of each image's label, and the classes of sets that keep their labels.

    Args:
        found: The label that the table gives each image.
    """
    texts: list[str] = []
    kept: set[str] = set()
    for part in sets:
        given = found[len(texts) : len(texts) + len(part.images)]
        own = [part.classes[image.label] if image.label >= 0 else "" for image in part.images]
        if all(label is None for label in given):
            texts += own
            kept.update(own)
        else:
            texts += [label or "" for label in given]
    return texts, sorted(kept - {""})


def _renumber(part: ImageSet, numbers: list[int], classes: list[str]) -> ImageSet:
    pairs = zip(part.images, numbers, strict=True)
    images = [image._replace(label=number) for image, number in pairs]
    return ImageSet(part.name, images, classes if max(numbers) >= 0 else [])


def _tell_unlabeled(part: ImageSet) -> list[str]:
    bare = [image.path for image in part.images if image.label < 0]
    if not bare or not part.classes:
        return []
    return [
        f"{len(bare):,} of {len(part.images):,} images have no row in --labels, or no label there, "
        f"such as {bare[0]}"
    ]
