"""Let standard output take any text, also where the terminal's encoding is ASCII."""

import codecs
import io
import sys

_PLAIN = {"…": "...", "•": "-", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'}


def prepare_output() -> None:
    """Write what standard output cannot encode in plainer letters, or else as an escape.

    Python would raise UnicodeEncodeError there. It takes the encoding from the locale (LANG=C) or
    from PYTHONIOENCODING.
    """
    codecs.register_error("plain", _replace)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="plain")


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    plain = (_PLAIN.get(c, c.encode("ascii", "backslashreplace").decode()) for c in characters)
    return "".join(plain), error.end
