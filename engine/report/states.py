"""Say whether a job trains a run, and whether the run has reached its end."""

from engine.log.time_spans import show_span
from engine.state import lease


def tell_state(
    url: str, *, done: bool, stopped_early: bool, empty: bool = False, left: bool = False
) -> str:
    """Say in a word or two how a run is, by who holds it.

    A job that holds the run and has not shown itself for three of its periods is silent.

    Args:
        url: URL of the run.
        done: Whether the newest step is the last one of the run.
        stopped_early: Whether a figure of the log ended the training at the newest step.
        empty: Whether nothing of the run was written yet.
        left: Whether this process, which may still hold the run, trains it no more.

    Raises OSError and InputError when it cannot be read who holds the run.
    """
    sight = None if left else lease.describe_holder(url)
    if empty and (sight is None or sight.released or sight.dead):
        return "began nothing"
    if sight is None or sight.released:
        stopped = "stopped early" if stopped_early else "stopped"
        return "done" if done else stopped
    if sight.dead:
        return "dead"
    if sight.silent is not None and sight.silent > 3 * sight.period:
        return f"silent for {show_span(sight.silent)}"
    return "starts" if empty else "trains"
