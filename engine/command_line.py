"""What tyro says of a mistake, as one line."""

import contextlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

from shards.errors import InputError


@contextmanager
def plain_errors() -> Iterator[None]:
    """InputError in place of tyro's framed message and its exit; `--help` exits as it does."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(messages.getvalue())) from None
    except ValueError as error:  # from a config's own check
        raise InputError(str(error)) from None


def _one_line(message: str) -> str:
    """tyro's framed error as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", message)
    text = " ".join(re.sub(r"[│╭╮╰╯─]+", " ", text).split())
    # The box's title says what the text behind it says again.
    text = re.sub(r"^(Value error|Parsing error|Invalid choice|Missing argument) ", "", text)
    return re.split(r" (?:Argument|For full) helptext", text)[0]
