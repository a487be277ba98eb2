"""Let standard output take any text, also where the terminal's encoding is ASCII.

It may also be closed.
"""

import codecs
import io
import os
import sys

_PLAIN = {"…": "...", "•": "-", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'}


def prepare_output() -> None:
    """Write what standard output cannot encode in plainer letters, or else as an escape.

    Python would raise UnicodeEncodeError there. It takes the encoding from the locale (LANG=C) or
    from PYTHONIOENCODING.
    """
    _fill_closed_files()
    codecs.register_error("plain", _replace)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="plain")


def _fill_closed_files() -> None:
    """Open the null device as the standard input, output or error that was closed.

    Otherwise the next file or pipe that is opened gets the number, and what a library or another
    process writes to its standard error ends up in there.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    plain = (_PLAIN.get(c, c.encode("ascii", "backslashreplace").decode()) for c in characters)
    return "".join(plain), error.end
