"""Make HTML so that text is always escaped: whatever is not made here is text, never markup."""

import html
import re

from shards.errors import printable

LONGEST = 2000  # characters of one text on the page

# These elements have no content. Of the others, an empty one still needs its closing tag.
_VOID = {"img", "meta", "path", "line", "wbr"}


class Html(str):
    """A piece of HTML. Only this module makes it of other texts."""

    __slots__ = ()


Child = Html | str | int | None


def tag(name: str, /, *children: Child, **attributes: str | int | float | None) -> Html:
    """Make an element, with the texts among its children and its attributes escaped.

    A child or an attribute that is None is left out. Underscores in an attribute's name become
    hyphens, and one at its end is dropped, as in `class_`.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{given}/>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Put pieces and texts behind one another."""
    return Html("".join(_escape(child) for child in children if child is not None))


def breakable(name: str) -> Html:
    """Show the name of a field or of a figure, which may be broken behind its dots and lines."""
    first, *rest = re.split(r"(?<=[._])(?=[^._])", name[:LONGEST])
    return tag("code", first, *(join(tag("wbr"), piece) for piece in rest))


def constant(source: str) -> Html:
    """Take a text of this program, such as a style sheet, as HTML. Never give it a stranger's."""
    return Html(source)


def _escape(value: Child | float) -> str:
    """Escape a text, on one line and of bounded length. HTML stays as it is."""
    if isinstance(value, Html):
        return value
    text = str(value)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return html.escape(printable(text), quote=True)
