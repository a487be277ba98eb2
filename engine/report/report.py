"""Write RUN/report.html, at the end of a training and whenever somebody asks for it."""

from collections.abc import Callable, Sequence

from engine.log.patience import try_for
from engine.report.facts import RunFacts, collect
from engine.report.page import MOST_RUNS, make_page
from engine.state import layout
from shards.errors import InputError
from shards.storage import files

PATIENCE = 30.0  # seconds that the end of a training waits for its report


def write_report(run: str, others: Sequence[str] = (), out: str = "") -> str:
    """Write a run's report, in which other runs are compared with it, and return its URL.

    Args:
        run: URL of the run.
        others: URLs of the other runs.
        out: URL of the file. By default it is RUN/report.html.

    Raises InputError when a URL is no run's, and OSError.
    """
    if len(others) >= MOST_RUNS:
        raise InputError(f"--compare takes at most {MOST_RUNS - 1} runs, not {len(others)}")
    files.check(out, "--out")
    if out and out.endswith("/"):
        raise InputError(f"--out {files.redact(out)}: is a folder: give the URL of a file")
    runs = [collect(run, "RUN"), *(collect(other, "--compare", pictures=False) for other in others)]
    url = out or files.join(run.rstrip("/") or run, layout.REPORT)
    files.write(url, make_page(runs))
    return url


def write_at_end(run: str, main: bool, say: Callable[[str], None]) -> None:
    """Write the report of a training that has ended, and say where it is.

    Only the first process, for which `main` is True, does anything. The training is saved already,
    so a report that fails, or that takes long because a store does not answer, is reported in one
    line and is never fatal.
    """
    if not main:
        return
    told: list[str] = []
    fault = try_for(PATIENCE, lambda: told.append(files.redact(write_report(run))))
    say(f"{layout.REPORT} was not written: {fault}" if fault else f"report        {told[0]}")


__all__ = ["RunFacts", "write_at_end", "write_report"]
