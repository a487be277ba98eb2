"""Write RUN/report.html, at the end of a training and whenever somebody asks for it."""

import threading
from collections.abc import Callable, Sequence

from engine.log.patience import try_for
from engine.report.facts import collect, list_evaluations
from engine.report.page import MOST_RUNS, make_page
from engine.state import layout
from shards.errors import InputError
from shards.storage import files, misplaced
from shards.storage.entries import list_entries

PATIENCE = 30.0  # seconds that the end of a training waits for its report


def write_report(run: str, others: Sequence[str] = (), out: str = "", *, left: bool = False) -> str:
    """Write a run's report, in which other runs are compared with it, and return its URL.

    Args:
        run: URL of the run.
        others: URLs of the other runs.
        out: URL of the file. By default it is RUN/report.html.
        left: Whether this process, which may still hold the run, trains it no more.

    Raises InputError when a URL is no run's, and OSError.
    """
    if len(others) >= MOST_RUNS:
        raise InputError(f"--compare takes at most {MOST_RUNS - 1} runs, not {len(others)}")
    files.check(out, "--out")
    files.check_folder(misplaced.folder_of(out), "--out")
    if out and out.endswith("/"):
        raise InputError(f"--out {files.redact(out)}: is a folder: give the URL of a file")
    runs = [
        collect(run, "RUN", left=left),
        *(collect(other, "--compare", pictures=False) for other in others),
    ]
    url = out or files.join(run.rstrip("/") or run, layout.REPORT)
    files.write(url, make_page(runs))
    return url


def write_at_end(
    run: str,
    main: bool,
    say: Callable[[str], None],
    news: bool = True,
    leave: threading.Event | None = None,
) -> None:
    """Write the report of a training that has ended, and say where it is.

    Without `news` of the training it stays as it is, unless there are evaluations that it lacks.
    Only the first process, for which `main` is True, does anything. The training is saved already,
    so a report that fails, or that takes long because a store does not answer, is reported in one
    line and is never fatal. So is one that nobody waits for any more, because `leave` is set.
    """
    if not main:
        return
    told: list[str] = []

    def write() -> None:
        url = files.join(run, layout.REPORT)
        stays = not news and _is_current(run)
        told.append(files.redact(url if stays else write_report(run, left=True)))

    fault = try_for(PATIENCE, write, leave)
    say(f"{layout.REPORT} was not written: {fault}" if fault else f"report        {told[0]}")


def _is_current(run: str) -> bool:
    """Return whether a report is there, and no evaluation has written anything since."""
    there = {entry.name: entry.modified for entry in list_entries(run)}
    made = there.get(layout.REPORT)
    return made is not None and all(
        entry.modified is not None and entry.modified <= made for _, entry in list_evaluations(run)
    )
