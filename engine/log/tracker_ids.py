"""Keep the id that a run has at trackers in RUN/trackers.json, so that it survives restarts."""

import json
import re
import secrets
from collections.abc import Callable

from shards.storage import files

TRACKERS = "trackers.json"


def run_id(run: str, report: Callable[[str], None]) -> str:
    """Return the id of a run, which is drawn and written when the run has none yet.

    A damaged file is reported, and gets another id. When the file cannot be read or written, that
    is reported too, and an id is drawn that no later start has.
    """
    url, drawn = files.join(run, TRACKERS), secrets.token_hex(4)
    try:
        return _keep(url, drawn, report)
    except OSError as error:
        report(f"{error}; trackers show this start of the run as a run of its own")
        return drawn


def _keep(url: str, drawn: str, report: Callable[[str], None]) -> str:
    """Return the id in the file, which is `drawn` if it has none yet."""
    try:
        found = files.read_json(url)
        if isinstance(found, dict) and re.fullmatch(r"[0-9a-z]{4,64}", str(found.get("id"))):
            return str(found["id"])
        raise ValueError(found)
    except FileNotFoundError:
        pass
    except ValueError:
        report(f"{files.redact(url)} is damaged: the run gets another id at trackers")
    files.write(url, json.dumps({"id": drawn}).encode())
    return drawn
