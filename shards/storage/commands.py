"""Spell commands that a user can copy: quoted for the shell, and right in the current folder."""

import os
import shlex
from pathlib import Path

from shards.storage.redaction import redact

_LAUNCH = Path(__file__).parents[2] / "launch"


def quote(url: str) -> str:
    """Return a URL, without credentials, as one word of a shell."""
    return shlex.quote(redact(url))


def spell_program(name: str, *words: str, anywhere: bool = False) -> str:
    """Return the command that runs one of this project's programs.

    It is right in the current folder, and with `anywhere` in every folder of this machine. The
    URLs among its words are given as they shall be shown.

    Args:
        name: The name of the program's file, such as `pack.py`.
        words: Its options and URLs.
    """
    place = str(_LAUNCH / name)
    near = os.path.relpath(place)
    shown = place if anywhere or near.startswith("..") else near
    return f"python {shlex.quote(shown)} {' '.join(quote(word) for word in words)}".rstrip()
