"""The result of an evaluation: read it from a file and print it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import MinLen
from rich.console import Console
from rich.table import Table

from engine.evaluation.features import Accuracy
from shards.documents import build
from shards.errors import InputError, printable
from shards.storage import files

Row = dict[str, str | int | float]

ALWAYS_HIT = 5  # With so many classes or fewer, top-5 is 100% whatever the encoder is.


@dataclass(frozen=True)
class Result:
    """The result of an evaluation."""

    metrics: dict[str, float]  # fractions, by their names in the run's metrics
    table: Annotated[list[Row], MinLen(1)]  # to print; its accuracies are fractions


def show_accuracy(found: Accuracy, classes: int) -> Row:
    """Return a row's accuracies on data.val, of those that tell something.

    Of five classes every label is among the best five. The mean of the classes' accuracies is top-1
    where all classes have equally many images.
    """
    row: Row = {"top-1": found.top1}
    if classes > ALWAYS_HIT:
        row["top-5"] = found.top5
    if found.mean_class is not None:
        row["mean of classes"] = found.mean_class
    return row


def show_chosen(found: Accuracy, chosen: bool, classes: int) -> Row:
    """Return a row's accuracies on data.val, which are empty unless the row was chosen."""
    shown = show_accuracy(found, classes)
    return shown if chosen else dict.fromkeys(shown, "")


def list_metrics(found: Accuracy, classes: int, name: Callable[[str], str]) -> dict[str, float]:
    """Return the same accuracies by their names in the metrics, which `name` makes."""
    figures = {"top-1": "top1", "top-5": "top5", "mean of classes": "mean_class"}
    shown = show_accuracy(found, classes)
    return {name(figures[title]): float(value) for title, value in shown.items()}


def show(result: Result, console: Console) -> None:
    """Print the result's table."""
    table = Table(box=None, pad_edge=False)
    for name, value in result.table[0].items():
        table.add_column(printable(name), justify="left" if isinstance(value, str) else "right")
    for row in result.table:
        table.add_row(*map(_format, row.values()))
    console.print(table)


def read_result(url: str, report: Callable[[str], None]) -> Result | None:
    """Read a result. Return None when there is none, or when it is damaged, which is reported."""
    try:
        return build(Result, files.read_json(url))
    except FileNotFoundError:
        return None
    except (ValueError, InputError) as error:
        report(f"{files.redact(url)} is damaged ({error}); measured again")
        return None


def _format(value: str | int | float) -> str:
    return f"{value:.2%}" if isinstance(value, float) else printable(str(value))
