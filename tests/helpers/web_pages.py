"""Read a page as a browser does, and fail where it is not well-formed."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"img", "meta", "path", "line", "wbr"}


@dataclass
class WebPage(HTMLParser):
    """Holds a page's tags, attributes and texts. Raises AssertionError for a tag left open."""

    tags: set[str] = field(default_factory=set)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)  # of tag, name, value
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self._goes_on = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "wbr":  # it breaks no word, so the text goes on
            self._goes_on = True
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, f"<{tag}/> does not close an element in HTML"
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            before = self.texts.pop() if self._goes_on else ""
            self.texts.append(before + data)
            self._goes_on = False

    @property
    def text(self) -> str:
        """Return all texts, with single spaces between their words."""
        return " ".join(" ".join(self.texts).split())


def read_page(content: bytes) -> WebPage:
    """Parse a page. Raises AssertionError when an element is not closed."""
    page = WebPage()
    page.feed(content.decode())
    page.close()
    assert not page._open
    return page
