"""Put a report together: one HTML file that needs neither network nor scripts."""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from engine.report import sections
from engine.report.charts import draw_curves
from engine.report.facts import RunFacts
from engine.report.html import Html, join, tag
from engine.report.style import STYLE
from shards.storage import files

MOST_RUNS = 8  # in one report, for each of which there is a color
MOST_BYTES = 8_000_000  # of a page
_REST = 500_000  # of them are for what is no section

# The page may load nothing and run nothing, whatever texts of strangers stand in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def make_page(runs: Sequence[RunFacts]) -> bytes:
    """Make the report of the first run, in which the others are compared with it."""
    names = name_runs([run.url for run in runs])
    own = runs[0]
    parts: dict[str, Callable[[], Html | None]] = {
        "Health": lambda: sections.write_health(own),
        "Curves": lambda: draw_curves(runs, names),
        "Comparison": lambda: sections.write_comparison(runs, names),
        "Views": lambda: sections.write_views(own),
        "Neighbors": lambda: sections.write_neighbours(own),
        "Evaluations": lambda: sections.write_evaluations(own),
        "Parent": lambda: sections.write_parent(own),
        "Recipe": lambda: sections.write_recipe(own),
    }
    written = {title: write() for title, write in parts.items()}
    shown = _bounded({title: part for title, part in written.items() if part is not None})
    links = [tag("a", title, href=f"#{title.lower()}") for title in shown]
    body = [
        tag("section", tag("h2", title), part, id=title.lower()) for title, part in shown.items()
    ]
    head = [
        tag("h1", names[0]),
        tag("p", tag("code", files.redact(own.url)), class_="soft"),
        *[tag("p", _compared(run, name), class_="soft") for run, name in _others(runs, names)],
    ]
    main = tag("main", *head, sections.write_tiles(own), tag("nav", *links), *body)
    return _wrap(names[0], main)


def _bounded(parts: dict[str, Html]) -> dict[str, Html]:
    """Leave out the largest parts, and say so, until the page is not too large."""
    sizes = {title: len(part.encode("utf-8", "replace")) for title, part in parts.items()}
    while sum(sizes.values()) > MOST_BYTES - _REST:
        title = max(sizes, key=lambda one: sizes[one])
        text = f"This part is left out, because it has {sizes[title] / 1e6:.1f} MB."
        parts[title], sizes[title] = tag("p", text, class_="card warn"), 0
    return parts


def _others(runs: Sequence[RunFacts], names: Sequence[str]) -> list[tuple[RunFacts, str]]:
    return list(zip(runs, names, strict=True))[1:]


def _compared(run: RunFacts, name: str) -> Html:
    faults = f" ({'; '.join(run.faults)})" if run.faults else ""
    return join("compared with ", tag("b", name), ": ", tag("code", files.redact(run.url)), faults)


def _wrap(title: str, main: Html) -> bytes:
    size = len(main.encode())
    note = (
        f"Made on {datetime.now(UTC):%Y-%m-%d at %H:%M} UTC from the run's own files. The page has "
        f"{size / 1e6:.1f} MB. It loads nothing and runs nothing. A long curve is the mean "
        "of each column of pixels, before the range from its smallest to its largest value."
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{title}: report"),
        tag("style", STYLE),
    )
    main = Html(main.removesuffix("</main>") + tag("footer", note) + "</main>")
    page = "<!DOCTYPE html>\n" + tag("html", head, tag("body", main), lang="en") + "\n"
    return page.encode("utf-8", "backslashreplace")


def name_runs(urls: Sequence[str]) -> list[str]:
    """Name runs by the ends of their URLs, as short as tells them apart."""
    parts = [[p for p in re.split("/+", files.redact(url)) if p] or [url] for url in urls]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(names, start=1)]
