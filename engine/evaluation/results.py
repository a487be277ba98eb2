"""What an evaluation found: as it is kept, and as it is shown."""

from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from engine.evaluation.features import Accuracy
from shards.storage import files

Row = dict[str, str | int | float]


class Result(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, float]  # fractions, by the name that they have in the run's metrics
    table: list[Row]  # what is shown; accuracies are floats, as fractions


def chosen_columns(found: Accuracy, chosen: bool) -> Row:
    """The figures on data.val of the choice that was made; of the others there are none."""
    return {"top-1": found.top1, "top-5": found.top5} if chosen else {"top-1": "", "top-5": ""}


def show(result: Result, console: Console) -> None:
    """Print the result's table."""
    table = Table(box=None, pad_edge=False)
    for name, value in result.table[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in result.table:
        table.add_row(*map(_shown, row.values()))
    console.print(table)


def read_result(url: str, report: Callable[[str], None]) -> Result | None:
    try:
        document = files.read_json(url)
        result = Result(dict(document["metrics"]), [dict(row) for row in document["table"]])
        if not result.table:
            raise ValueError
        return result
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        report(f"{files.redact(url)} is damaged; measured again")
        return None


def _shown(value: str | int | float) -> str:
    return f"{value:.2%}" if isinstance(value, float) else str(value)
