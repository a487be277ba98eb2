"""Define InputError, the one exception that users see as a single line."""


class InputError(Exception):
    """Something that a user gave is wrong. The text names the field, file or URL, and the remedy.

    Entry points print its text as one line and exit with a non-zero status, without a traceback.
    """
