"""Make the tables of a report."""

from collections.abc import Iterable, Sequence

from engine.report.html import Child, Html, tag

MOST_ROWS = 500  # of one table on the page


def make_table(
    head: Sequence[Child],
    rows: Iterable[Sequence[Child]],
    numbers: Sequence[int] = (),
    long: Sequence[int] = (),
) -> Html:
    """Make a table whose first column names its rows. It scrolls where the screen is narrow.

    Args:
        numbers: The columns that are aligned to the right.
        long: The columns that need some width for their texts.
    """
    rows = list(rows)
    kinds = dict.fromkeys(range(len(head))) | dict.fromkeys(numbers, "number")
    kinds |= dict.fromkeys(long, "long")
    top = tag("tr", *(tag("th", c, class_=k) for c, k in zip(head, kinds.values(), strict=True)))
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(
                tag("td", c, class_=k)
                for c, k in zip(row[1:], list(kinds.values())[1:], strict=True)
            ),
        )
        for row in rows[:MOST_ROWS]
    ]
    table = tag("table", tag("thead", top), tag("tbody", *body))
    more = len(rows) - MOST_ROWS
    left_out = tag("p", f"{more:,} more rows are left out.", class_="soft") if more > 0 else None
    return tag("div", table, left_out, class_="scroll")


def fold(summary: str, *children: Child) -> Html:
    """Hide what is long until the reader opens it."""
    return tag("details", tag("summary", summary), *children)
