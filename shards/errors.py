"""Define InputError, which users see as a single line, and make the text of strangers printable."""


class InputError(Exception):
    """Something that a user gave is wrong. The text names the field, file or URL, and the remedy.

    Entry points print its text as one line and exit with a non-zero status, without a traceback.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Escape the characters that do not print, so that a text is one line and only that.

    Names of files, keys of samples and messages of a store may be a stranger's. Their newlines
    could pass for lines of this program, and their escape sequences could steer the terminal.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
